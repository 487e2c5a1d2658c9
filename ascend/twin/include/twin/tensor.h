// GlobalTensor and LocalTensor: an address, what it belongs to, and the state of its buffer.
#pragma once
#include <cstring>

#include "twin/params.h"

namespace twin {

template <class T>
T load_one(Op& op, const Ref& r) {
  T x;
  std::memcpy(&x, op.read(r, sizeof(T)), sizeof(T));
  return x;
}

template <class T>
void store_one(Op& op, const Ref& r, T x) {
  std::memcpy(op.write(r, sizeof(T)), &x, sizeof(T));
}

inline int mem_of(AscendC::TPosition p) {
  using P = AscendC::TPosition;
  switch (p) {
    case P::A1:
    case P::B1:
    case P::C1:
      return kL1;
    case P::A2:
      return kL0A;
    case P::B2:
      return kL0B;
    case P::C2:
      return kBT;
    case P::CO1:
      return kL0C;
    case P::C2PIPE2GM:
      return kFB;
    case P::GM:
    case P::CO2:
      return kGM;
    default:
      return kUB;
  }
}

}  // namespace twin

namespace AscendC {

template <class T>
class GlobalTensor {
 public:
  using PrimType = T;

  void SetGlobalBuffer(T* buffer, uint64_t size) {
    base_ = reinterpret_cast<uint64_t>(buffer);
    end_ = base_ + uint64_t(twin::bytes_of<T>(int64_t(size)));
  }
  void SetGlobalBuffer(T* buffer) {
    base_ = reinterpret_cast<uint64_t>(buffer);
    end_ = ~uint64_t(0);
  }
  GlobalTensor operator[](uint64_t element) const {
    GlobalTensor t = *this;
    t.base_ += uint64_t(twin::bytes_of<T>(int64_t(element)));
    return t;
  }
  T GetValue(uint64_t element) const {
    T x{};
    int64_t at = 0;
    const twin::Ref r = (*this)[element].ref();
    twin::Buffer* b = twin::find_buffer(r.addr, at);
    if (twin::core().counting()) {
      if (b != nullptr && b->real) std::memcpy(&x, b->data + at, sizeof(T));
      ++twin::core().stats.instructions[twin::kS];
      return x;
    }
    twin::core().issue(twin::kS, "GetValue", [&](twin::Op& op) { x = twin::load_one<T>(op, r); });
    return x;
  }
  void SetValue(uint64_t element, T x) const {
    const twin::Ref r = (*this)[element].ref();
    twin::core().issue(twin::kS, "SetValue", [&](twin::Op& op) { twin::store_one<T>(op, r, x); });
  }
  const T* GetPhyAddr() const { return reinterpret_cast<const T*>(base_); }
  uint64_t GetSize() const { return (end_ - base_) * 8 / uint64_t(twin::kBits<T>); }

  twin::Ref ref() const { return {twin::kGM, base_, end_}; }

 private:
  uint64_t base_ = 0, end_ = 0;
};

template <class T>
class LocalTensor {
 public:
  using PrimType = T;

  LocalTensor() = default;
  LocalTensor(twin::Ref r, TPosition position, twin::Slot* slot)
      : ref_(r), position_(position), slot_(slot), generation_(slot ? slot->generation : 0) {}

  LocalTensor operator[](uint32_t element) const {
    LocalTensor t = *this;
    if (twin::kBits<T> == 4 && element % 2 != 0)
      throw twin::Finding("align", "an int4b_t tensor starts at an odd element");
    t.ref_.addr += uint64_t(twin::bytes_of<T>(element));
    return t;
  }
  template <class U>
  LocalTensor<U> ReinterpretCast() const {
    LocalTensor<U> t(ref_, position_, slot_);
    t.set_generation(generation_);
    return t;
  }
  T GetValue(uint32_t element) const {
    T x{};
    const twin::Ref r = (*this)[element].ref();
    twin::core().issue(twin::kS, "GetValue", [&](twin::Op& op) { x = twin::load_one<T>(op, r); });
    return x;
  }
  void SetValue(uint32_t element, T x) const {
    const twin::Ref r = (*this)[element].ref();
    twin::core().issue(twin::kS, "SetValue", [&](twin::Op& op) { twin::store_one<T>(op, r, x); });
  }
  uint32_t GetSize() const { return uint32_t((ref_.end - ref_.addr) * 8 / twin::kBits<T>); }
  TPosition GetPosition() const { return position_; }

  // The address, of a tensor that is still the owner of its buffer.
  twin::Ref ref() const {
    if (slot_ != nullptr && (slot_->generation != generation_ || slot_->state == twin::Slot::kFree))
      throw twin::Finding("queue", "a tensor is used after FreeTensor");
    if (ref_.end == 0) throw twin::Finding("queue", "a tensor is used that no buffer was given to");
    return ref_;
  }
  twin::Slot* slot() const { return slot_; }
  void set_generation(uint32_t generation) { generation_ = generation; }

 private:
  twin::Ref ref_{0, 0, 0};
  TPosition position_ = TPosition::VECCALC;
  twin::Slot* slot_ = nullptr;
  uint32_t generation_ = 0;
};

}  // namespace AscendC
