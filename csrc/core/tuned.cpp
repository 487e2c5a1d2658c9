#include "core/tuned.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "core/build.h"
#include "core/env.h"
#include "families.h"

namespace tessella {

struct Hash {
  size_t operator()(const TunedCase& c) const {
    uint64_t hash = c.device ^ c.family ^ c.scheme;
    for (const int64_t x : {c.N, c.K, c.tokens})
      hash = (hash ^ static_cast<uint64_t>(x)) * 0x9e3779b97f4a7c15u;
    return static_cast<size_t>(hash ^ hash >> 32);
  }
};

struct Table {
  std::unordered_map<TunedCase, TunedChoice, Hash> rows;
  std::string error;
};

// Never freed: a launch on another thread may still read the last one, and there are few.
static std::atomic<const Table*> current{nullptr};

static std::vector<std::string> fields(const std::string& line) {
  std::vector<std::string> parts;
  for (size_t at = 0; at <= line.size();) {
    const size_t tab = std::min(line.find('\t', at), line.size());
    parts.push_back(line.substr(at, tab - at));
    at = tab + 1;
  }
  return parts;
}

static std::string check_row(const std::vector<std::string>& f,
                             const std::vector<std::string>& kernels) {
  if (f.size() == 2 && f[0] == "error") return f[1];  // found before it came here
  if (f.size() != 9)
    return "a tuning table: expected 9 fields in a row, got " + std::to_string(f.size());
  for (const std::string& name : kernels)
    if (name == f[7] && name.compare(0, f[2].size() + 1, f[2] + ".") == 0) return "";
  std::string text = f[0] + ": kernel: expected one of";
  for (const std::string& name : kernels)
    if (name.compare(0, f[2].size() + 1, f[2] + ".") == 0) text += " " + name;
  return text + ", got '" + f[7] +
         "'; `tessella tune` makes the table anew, TESSELLA_TUNE=0 ignores it";
}

const std::string& set_tuned(const std::string& text) {
  auto* table = new Table;
  const std::vector<std::string> kernels = all_kernels();
  for (size_t at = 0; kHasSm90 && at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::vector<std::string> f = fields(text.substr(at, end - at));
    at = end + 1;
    table->error = check_row(f, kernels);
    if (!table->error.empty()) break;
    const auto name = [&](int i) { return tuned_name(f[i].c_str()); };
    const auto number = [&](int i) { return std::atoll(f[i].c_str()); };
    const TunedCase problem{name(1), name(2), name(3), number(4), number(5), number(6)};
    table->rows[problem] = {f[7], int(number(8)), f[0]};
  }
  current.store(table, std::memory_order_release);
  return table->error;
}

const TunedChoice* tuned(const TunedCase& problem) {
  const Table* table = current.load(std::memory_order_acquire);
  if (table == nullptr || !env().tuned) return nullptr;
  if (!table->error.empty()) throw std::runtime_error(table->error);
  const auto found = table->rows.find(problem);
  return found == table->rows.end() ? nullptr : &found->second;
}

}  // namespace tessella

extern "C" const char* tessella_set_tuned(const char* text) {
  return tessella::set_tuned(text).c_str();
}
