// Flags between pipes and between cores, barriers, and what a core knows of itself.
#pragma once
#include "twin/pipe.h"

enum KernelMetaType {
  KERNEL_TYPE_AIV_ONLY,
  KERNEL_TYPE_AIC_ONLY,
  KERNEL_TYPE_MIX_AIV_1_0,
  KERNEL_TYPE_MIX_AIC_1_0,
  KERNEL_TYPE_MIX_AIC_1_2,
};

namespace AscendC {

inline twin::Pipe pipe_of(pipe_t p) {
  if (p == PIPE_ALL) throw twin::Finding("type", "PIPE_ALL is not a pipe that can set a flag");
  return twin::Pipe(p);
}

template <HardEvent kEvent>
void SetFlag(TEventID id) {
  if (id < 0 || id > 7) throw twin::Finding("field", "SetFlag: event id is not in 0..7");
  const twin::Ends e = pipes_of(kEvent);
  twin::core().set_flag(e.producer, e.consumer, id);
}

template <HardEvent kEvent>
void WaitFlag(TEventID id) {
  if (id < 0 || id > 7) throw twin::Finding("field", "WaitFlag: event id is not in 0..7");
  const twin::Ends e = pipes_of(kEvent);
  twin::core().wait_flag(e.producer, e.consumer, id);
}

template <pipe_t kPipe>
void PipeBarrier() {
  if (kPipe == PIPE_ALL)
    twin::core().barrier_all();
  else
    twin::core().barrier(twin::Pipe(kPipe));
}

template <uint8_t kMode, pipe_t kPipe>
void CrossCoreSetFlag(uint16_t id) {
  if (kPipe == PIPE_S) throw twin::Finding("type", "CrossCoreSetFlag: not on PIPE_S");
  twin::core().set_cross(kMode, pipe_of(kPipe), id);
}

template <uint8_t kMode = 0, pipe_t kPipe = PIPE_S>
void CrossCoreWaitFlag(uint16_t id) {
  twin::core().wait_cross(id);
}

template <bool kVectorsOnly = true>
void SyncAll() {
  twin::core().sync_all(kVectorsOnly);
}

inline void CheckKernelType(KernelMetaType type) {
  const twin::Kind kind = twin::launched_kind();
  const bool ok = type == KERNEL_TYPE_MIX_AIC_1_2 ? kind == twin::Kind::kMix
                  : type == KERNEL_TYPE_AIV_ONLY || type == KERNEL_TYPE_MIX_AIV_1_0
                      ? kind == twin::Kind::kVector
                      : kind == twin::Kind::kCube;
  if (!ok) throw twin::Finding("type", "the kernel is of another type than it was launched as");
}

inline int64_t GetBlockIdx() {
  const twin::Core& c = twin::core();
  return twin::launched_kind() == twin::Kind::kMix && !c.aic ? c.block * 2 + c.sub : c.block;
}
inline int64_t GetBlockNum() { return twin::launched_blocks(); }
inline int64_t GetSubBlockIdx() { return twin::core().sub; }
inline int64_t GetSubBlockNum() { return twin::launched_kind() == twin::Kind::kMix ? 2 : 1; }
inline int64_t GetTaskRation() {
  return twin::launched_kind() == twin::Kind::kMix && !twin::core().aic ? 2 : 1;
}

template <class T>
void SetAtomicAdd() {
  twin::core().atomic = twin::Atomic::kAdd;
}
inline void SetAtomicNone() { twin::core().atomic = twin::Atomic::kNone; }

}  // namespace AscendC
