// Planner of attention: a pure function from a ragged batch to a table of tasks, the same table for
// every device. XY-Serve (ASPLOS 2026), sections 4.2 and 4.3, with longest-first order.
//
// The queries of request b and kv head j are G * q_len packed rows, G = H / J: row r is token r / G
// and query head j * G + r % G. A task is a tile of at most 16, 32, 64 or 128 rows against a range
// of keys, for every kv head. Where tasks are fewer than workers, or one is longer than its share,
// the keys are split and the parts merged by their log-sum-exp.
//
//   header [16]       magic, words, B, T, H, J, tasks, merges, partial_rows, units, split, window,
//                     big
//   tasks [tasks][8]  request, tile, row0, rows, kv_begin, kv_end, partial, cost; first those of
//                     tiles of 64 and 128 rows (`big` of them), then the others; longest first
//   merges [..][5]    request, row0, rows, partial, parts
//   padding           up to partial_rows words: the length of a plan bounds its partial rows, for
//                     who cannot read it (a plan in device memory)
//
// `partial` is the first of the task's rows in the buffers of partial results, -1: it writes the
// result. Part p of a merge has its rows at partial + p * rows.
#pragma once
#include <string>
#include <vector>

#include "core/hd.h"

namespace tessella::msm {

enum class Mask : int32_t { kFull, kCausal, kWindow, kTree };

constexpr int32_t kMagic = 0x6D736D31;
constexpr int kHeaderWords = 16, kTaskWords = 8, kMergeWords = 5;
constexpr int kBigTile = 64;         // rows from which a tile's tasks stand first
constexpr int64_t kSplitUnit = 256;  // a split length is a multiple of this many keys

struct Header {
  int32_t magic, words, B, T, H, J, tasks, merges, partial_rows, units, split, window, big,
      unused[3];
};
struct Task {
  int32_t request, tile, row0, rows, kv_begin, kv_end, partial, cost;
};
struct Merge {
  int32_t request, row0, rows, partial, parts;
};
static_assert(sizeof(Header) == 4 * kHeaderWords && sizeof(Task) == 4 * kTaskWords &&
                  sizeof(Merge) == 4 * kMergeWords,
              "the table is plain int32");

// A plan's parts, wherever its words lie.
struct PlanView {
  const int32_t* words;

  TSL_HD const Header& header() const { return *reinterpret_cast<const Header*>(words); }
  TSL_HD const Task* tasks() const { return reinterpret_cast<const Task*>(words + kHeaderWords); }
  TSL_HD const Merge* merges() const {
    return reinterpret_cast<const Merge*>(words + kHeaderWords + header().tasks * kTaskWords);
  }
};

struct Problem {
  const int32_t* cu_q;    // [B + 1]
  const int32_t* kv_len;  // [B]
  const int32_t* mask;    // [B] of Mask, or null: causal
  int64_t B;
  int H, J;
  int64_t window;
  int units;  // workers
  int64_t
      split;  // keys of a part: 0 chosen here, else a multiple of kSplitUnit, cut at its multiples
};

// The keys that any row of a tile may see.
struct Range {
  int64_t begin, end;
};
Range visible_keys(const Problem& problem, int64_t request, int64_t row0, int64_t rows);

// Rows of a tile for a request of `rows` packed rows.
int64_t tile_rows(int64_t rows);

std::vector<int32_t> plan(const Problem& problem);

// The split length for a batch of which only the longest cache is known.
int64_t uniform_split(int64_t B, int J, int64_t max_kv_len, int units);

// Empty, or what is wrong with a plan for this problem: it may be stale, or not a plan at all.
std::string plan_error(const Problem& problem, const int32_t* words, int64_t count);

std::string to_string(const PlanView& plan);

}  // namespace tessella::msm
