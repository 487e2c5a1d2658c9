// Canonical W4 weights <-> the panels of layout/w4_cube.h, on the host.
#pragma once
#include <cstring>

#include "layout/w4_cube.h"
#include "w4ax_gemm/params.h"

namespace tessella::ascend {

// Calls f(offset in the panels, offset in the tensor, bytes, which tensor) for every scale and
// zero: 0 channel scales, 1 group scales, 2 zeros.
template <class F>
void each_scale(const layout::W4Cube& panel, const F& f) {
  const bool channel = panel.scheme == Scheme::kChannel;
  const int64_t groups = channel ? 0 : panel.Kp / panel.G, size = panel.scale_bytes();
  for (int64_t n = 0; n < panel.N; ++n) {
    if (panel.tail_bytes() > 0) f(panel.channel_scale(n), n * 4, 4, 0);
    if (channel) f(panel.channel_zero(n), n, 1, 2);
    for (int64_t g = 0; g < groups; ++g) {
      f(panel.group_scale(n, g), (n * groups + g) * size, size, 1);
      f(panel.group_zero(n, g), n * groups + g, 1, 2);
    }
  }
}

inline uint8_t* field_of(const w4ax_gemm::Canonical& c, int which) {
  return which == 0   ? reinterpret_cast<uint8_t*>(c.channel_scales)
         : which == 1 ? static_cast<uint8_t*>(c.group_scales)
                      : c.zeros;
}

inline void pack_cube(const w4ax_gemm::Canonical& c, const layout::W4Cube& panel, uint8_t* out) {
  std::memset(out, 0, size_t(panel.bytes()));
  for (int64_t n = 0; n < panel.N; ++n)
    for (int64_t k = 0; k < panel.Kp; ++k) {
      const int q = c.codes[(n * panel.Kp + k) / 2] >> (k % 2 * 4) & 15;
      const layout::Slot s = panel.code(n, k);
      out[s.byte] = uint8_t(out[s.byte] | (q ^ 8) << s.shift);  // q - 8 in four bits
    }
  each_scale(panel, [&](int64_t to, int64_t from, int64_t bytes, int which) {
    std::memcpy(out + to, field_of(c, which) + from, size_t(bytes));
  });
}

inline void unpack_cube(const uint8_t* w, const layout::W4Cube& panel,
                        const w4ax_gemm::Canonical& c) {
  for (int64_t n = 0; n < panel.N; ++n)
    for (int64_t k = 0; k < panel.Kp; k += 2) {
      const layout::Slot a = panel.code(n, k), b = panel.code(n, k + 1);
      const int low = (w[a.byte] >> a.shift & 15) ^ 8, high = (w[b.byte] >> b.shift & 15) ^ 8;
      c.codes[(n * panel.Kp + k) / 2] = uint8_t(low | high << 4);
    }
  each_scale(panel, [&](int64_t from, int64_t to, int64_t bytes, int which) {
    std::memcpy(field_of(c, which) + to, w + from, size_t(bytes));
  });
}

}  // namespace tessella::ascend
