// TPipe, TQue and TBuf: buffers on the core, and the flags that a queue sets and waits for.
#pragma once
#include "twin/tensor.h"

namespace twin {

struct Ends {
  Pipe producer, consumer;
};

inline Ends ends_of(AscendC::TPosition p) {
  using P = AscendC::TPosition;
  switch (p) {
    case P::VECIN:
      return {kMTE2, kV};
    case P::VECOUT:
      return {kV, kMTE3};
    case P::A1:
    case P::B1:
    case P::C1:
      return {kMTE2, kMTE1};
    case P::A2:
    case P::B2:
    case P::C2:
      return {kMTE1, kM};
    case P::CO1:
      return {kM, kFIX};
    default:
      return {kV, kV};
  }
}

inline const char* position_name(AscendC::TPosition p) {
  static const char* const kNames[] = {"GM",  "A1",  "A2",    "B1",     "B2",      "C1",       "C2",
                                       "CO1", "CO2", "VECIN", "VECOUT", "VECCALC", "C2PIPE2GM"};
  return kNames[int(p)];
}

// Takes the next bytes of a memory for a buffer.
inline Ref take(AscendC::TPosition p, int64_t bytes) {
  Core& c = core();
  const int mem = mem_of(p);
  const int64_t start = c.used[size_t(mem)], n = (bytes + 31) / 32 * 32;
  if (c.aic != (mem != kUB))
    throw Finding(
        "path", std::string("a buffer in ") + mem_name(mem) + " on an " + (c.aic ? "AIC" : "AIV"));
  if (bytes <= 0 || start + n > mem_bytes(mem))
    throw Finding("capacity", std::string(mem_name(mem)) + " has " +
                                  std::to_string(mem_bytes(mem)) + " bytes, of which " +
                                  std::to_string(start) + " are taken; asked for " +
                                  std::to_string(bytes));
  if (++c.buffers > 64) throw Finding("capacity", "a TPipe has at most 64 buffers");
  c.used[size_t(mem)] = start + n;
  return {mem, uint64_t(start), uint64_t(start + n)};
}

}  // namespace twin

namespace AscendC {

template <TPosition kPosition, int32_t kDepth, int32_t kMask = 0>
class TQue {
 public:
  void init(int count, uint32_t bytes) {
    using twin::Finding;
    if (count > 8) throw Finding("capacity", "a TQue has at most 8 buffers");
    for (int i = 0; i < count; ++i) {
      auto slot = std::make_shared<twin::Slot>();
      slot->position = twin::position_name(kPosition);
      slot->id = twin::core().next_slot++;
      twin::core().slots.push_back(slot);
      items_.push_back({slot, twin::take(kPosition, bytes)});
    }
  }

  template <class T>
  LocalTensor<T> AllocTensor() {
    for (size_t i = 0; i < items_.size(); ++i) {
      Item& item = items_[(next_ + i) % items_.size()];
      if (item.slot->state != twin::Slot::kFree) continue;
      next_ = (next_ + i + 1) % items_.size();
      const twin::Ends e = twin::ends_of(kPosition);
      if (item.slot->returned && e.producer != e.consumer)
        twin::core().wait_flag(e.consumer, e.producer, item.slot->id);
      item.slot->returned = false;
      item.slot->state = twin::Slot::kAllocated;
      return LocalTensor<T>(item.ref, kPosition, item.slot.get());
    }
    throw twin::Finding("queue", std::string("AllocTensor: all ") + std::to_string(items_.size()) +
                                     " buffers of a " + twin::position_name(kPosition) +
                                     " queue are in use, the core would wait for ever");
  }

  template <class T>
  bool EnQue(const LocalTensor<T>& tensor) {
    twin::Slot* slot = own(tensor, "EnQue");
    if (slot->state != twin::Slot::kAllocated)
      throw twin::Finding("queue", "EnQue of a tensor that was not just allocated");
    if (int(queued_.size()) >= (kDepth == 0 ? 1 : kDepth))
      throw twin::Finding("queue", "EnQue: the queue already holds as many tensors as its depth");
    slot->state = twin::Slot::kQueued;
    queued_.push_back(slot);
    const twin::Ends e = twin::ends_of(kPosition);
    if (e.producer != e.consumer) twin::core().set_flag(e.producer, e.consumer, slot->id);
    return true;
  }

  template <class T>
  LocalTensor<T> DeQue() {
    if (queued_.empty())
      throw twin::Finding("queue", std::string("DeQue: nothing is in the ") +
                                       twin::position_name(kPosition) + " queue");
    twin::Slot* slot = queued_.front();
    queued_.pop_front();
    slot->state = twin::Slot::kDequeued;
    const twin::Ends e = twin::ends_of(kPosition);
    if (e.producer != e.consumer) twin::core().wait_flag(e.producer, e.consumer, slot->id);
    for (Item& item : items_)
      if (item.slot.get() == slot) return LocalTensor<T>(item.ref, kPosition, slot);
    throw twin::Finding("queue", "DeQue: the buffer is not of this queue");
  }

  template <class T>
  void FreeTensor(LocalTensor<T>& tensor) {
    twin::Slot* slot = own(tensor, "FreeTensor");
    if (slot->state == twin::Slot::kQueued)
      throw twin::Finding("queue", "FreeTensor of a tensor that is still in the queue");
    const twin::Ends e = twin::ends_of(kPosition);
    if (e.producer != e.consumer) twin::core().set_flag(e.consumer, e.producer, slot->id);
    slot->returned = true;
    slot->state = twin::Slot::kFree;
    ++slot->generation;
  }

 private:
  struct Item {
    std::shared_ptr<twin::Slot> slot;
    twin::Ref ref;
  };

  template <class T>
  twin::Slot* own(const LocalTensor<T>& tensor, const char* what) {
    tensor.ref();  // still alive
    for (Item& item : items_)
      if (item.slot.get() == tensor.slot()) return item.slot.get();
    throw twin::Finding("queue", std::string(what) + ": the tensor is of another queue");
  }

  std::vector<Item> items_;
  std::deque<twin::Slot*> queued_;
  size_t next_ = 0;
};

template <TPosition kPosition = TPosition::VECCALC>
class TBuf {
 public:
  void init(uint32_t bytes) { ref_ = twin::take(kPosition, bytes); }
  template <class T>
  LocalTensor<T> Get() {
    return LocalTensor<T>(ref_, kPosition, nullptr);
  }
  template <class T>
  LocalTensor<T> Get(uint32_t elements) {
    return GetWithOffset<T>(elements, 0);
  }
  template <class T>
  LocalTensor<T> GetWithOffset(uint32_t elements, uint32_t byte_offset) {
    twin::Ref r = ref_;
    r.addr += byte_offset;
    const uint64_t end = r.addr + uint64_t(twin::bytes_of<T>(elements));
    if (end > r.end) throw twin::Finding("bounds", "TBuf::Get: more elements than the buffer has");
    r.end = end;
    return LocalTensor<T>(r, kPosition, nullptr);
  }

 private:
  twin::Ref ref_{0, 0, 0};
};

enum class HardEvent {
  MTE2_MTE1,
  MTE1_MTE2,
  MTE2_V,
  V_MTE2,
  MTE3_V,
  V_MTE3,
  MTE1_M,
  M_MTE1,
  M_FIX,
  FIX_M,
  V_V,
  S_V,
  V_S,
  MTE3_MTE2,
  MTE2_MTE3,
  S_MTE2,
  MTE2_S,
  S_MTE3,
  MTE3_S,
  M_S,
  S_M,
  FIX_S,
  S_FIX,
  MTE2_M,
  M_MTE2,
  FIX_MTE2,
  MTE2_FIX,
  MTE1_FIX,
  FIX_MTE1,
};

inline twin::Ends pipes_of(HardEvent e) {
  using namespace twin;
  static constexpr Ends kEnds[] = {
      {kMTE2, kMTE1}, {kMTE1, kMTE2}, {kMTE2, kV},    {kV, kMTE2},   {kMTE3, kV},  {kV, kMTE3},
      {kMTE1, kM},    {kM, kMTE1},    {kM, kFIX},     {kFIX, kM},    {kV, kV},     {kS, kV},
      {kV, kS},       {kMTE3, kMTE2}, {kMTE2, kMTE3}, {kS, kMTE2},   {kMTE2, kS},  {kS, kMTE3},
      {kMTE3, kS},    {kM, kS},       {kS, kM},       {kFIX, kS},    {kS, kFIX},   {kMTE2, kM},
      {kM, kMTE2},    {kFIX, kMTE2},  {kMTE2, kFIX},  {kMTE1, kFIX}, {kFIX, kMTE1}};
  return kEnds[int(e)];
}

class TPipe {
 public:
  // Waits for everything, and gives all buffers back.
  void Destroy() {
    twin::core().barrier_all();
    twin::core().release();
  }
  template <TPosition kPosition, int32_t kDepth, int32_t kMask>
  bool InitBuffer(TQue<kPosition, kDepth, kMask>& queue, uint8_t count, uint32_t bytes) {
    queue.init(count, bytes);
    return true;
  }
  template <TPosition kPosition>
  bool InitBuffer(TBuf<kPosition>& buffer, uint32_t bytes) {
    buffer.init(bytes);
    return true;
  }
  template <HardEvent kEvent>
  TEventID AllocEventID() {
    int& bits = twin::core().events[int(kEvent)];
    for (int i = kEvent == HardEvent::M_MTE1 ? 3 : 0; i < 8; ++i)  // TPipe holds 0..2 of M_MTE1
      if (!(bits >> i & 1)) {
        bits |= 1 << i;
        return i;
      }
    throw twin::Finding("capacity", "AllocEventID: all 8 ids of this pair of pipes are taken");
  }
  template <HardEvent kEvent>
  void ReleaseEventID(TEventID id) {
    int& bits = twin::core().events[int(kEvent)];
    if (!(bits >> id & 1)) throw twin::Finding("flag", "ReleaseEventID: the id is not allocated");
    bits &= ~(1 << id);
  }
  // An id that is free now; it stays free.
  TEventID FetchEventID(HardEvent event) {
    const int bits = twin::core().events[int(event)];
    for (int i = event == HardEvent::M_MTE1 ? 3 : 0; i < 8; ++i)
      if (!(bits >> i & 1)) return i;
    throw twin::Finding("capacity", "FetchEventID: all 8 ids of this pair of pipes are taken");
  }
};

inline TPipe* GetTPipePtr() {
  static TPipe pipe;  // without state of its own: buffers and ids belong to the core
  return &pipe;
}

}  // namespace AscendC
