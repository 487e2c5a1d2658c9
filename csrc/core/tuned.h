// Choices that `tessella tune` measured on a device: explicit overrides of a family's planner.
//
// A table is set as a whole, seldom, and looked up without a lock. Planners stay pure functions:
// whoever launches asks here first.
#pragma once
#include <cstdint>
#include <string>

namespace tessella {

struct TunedChoice {
  std::string kernel;  // family.isa.tile, as `tessella info` lists them
  int split;
  std::string source;  // file and row
};

// What stands for M tokens in a table: the next power of two, 8 at least; 0: more than any table
// has.
constexpr int64_t tuned_tokens(int64_t M) {
  int64_t bucket = 8;
  while (bucket < M) bucket *= 2;
  return bucket <= 8192 ? bucket : 0;
}

// A number that stands for a name (FNV-1a), so that looking up compares no text.
constexpr uint64_t tuned_name(const char* name) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (; *name; ++name) hash = (hash ^ static_cast<unsigned char>(*name)) * 0x100000001b3u;
  return hash;
}

// What a choice belongs to: tuned_name of a device, a family and a scheme; shape; tuned_tokens.
struct TunedCase {
  uint64_t device, family, scheme;
  int64_t N, K, tokens;

  bool operator==(const TunedCase& o) const {
    return device == o.device && family == o.family && scheme == o.scheme && N == o.N && K == o.K &&
           tokens == o.tokens;
  }
};

// The measured choice, or null. Throws std::runtime_error when the tables are damaged.
const TunedChoice* tuned(const TunedCase& problem);

// Replaces all tables. Lines of `source device family scheme N K M kernel split`, separated by
// tabs, or `error message` where a table could not even be read. Returns what is wrong with them,
// or an empty string; tuned() throws what is wrong.
const std::string& set_tuned(const std::string& text);

}  // namespace tessella
