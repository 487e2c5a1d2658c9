// Canonical W4 weights <-> panels (layout/w4.h). 8 codes at a time; torch threads over panels.
#include <cstring>

#include "cpu/parallel.h"
#include "w4ax_gemm/params.h"

namespace tessella::w4ax_gemm {

using layout::W4Panel;

// 4 nibbles -> the low nibbles of 4 bytes, and back.
static uint32_t spread(uint32_t x) {
  return (x & 0xf) | (x & 0xf0) << 4 | (x & 0xf00) << 8 | (x & 0xf000) << 12;
}
static uint32_t gather(uint32_t x) {
  return (x & 0xf) | (x >> 4 & 0xf0) | (x >> 8 & 0xf00) | (x >> 12 & 0xf000);
}

// Calls f(n, address of feature n's scale and zero in the panels, index in the tensors).
template <class F>
static void each_group(const W4Panel& panel, int64_t n, const F& f) {
  if (panel.scheme == Scheme::kChannel) return;
  for (int64_t g = 0; g < panel.Kp / panel.G; ++g)
    f(panel.group_scale(n, g), panel.group_zero(n, g), n * (panel.Kp / panel.G) + g);
}

void pack_panels(const Canonical& c, const W4Panel& panel, uint8_t* out) {
  const int64_t row_bytes = panel.Kp / 2, scale_bytes = panel.scale_bytes();
  parallel_for(panel.panels(), W4Panel::kN * panel.Kp / 8, [&](int64_t begin, int64_t end) {
    std::memset(out + begin * panel.panel_bytes(), 0, size_t((end - begin) * panel.panel_bytes()));
    const int64_t last = std::min(end * W4Panel::kN, panel.N);
    for (int64_t n = begin * W4Panel::kN; n < last; ++n) {
      for (int64_t k = 0; k < panel.Kp; k += W4Panel::kStepK) {
        uint32_t codes;
        std::memcpy(&codes, c.codes + n * row_bytes + k / 2, 4);
        const uint32_t bytes = spread(codes & 0xffff) | spread(codes >> 16) << 4;
        std::memcpy(out + panel.code(n, k).byte, &bytes, 4);
      }
      each_group(panel, n, [&](int64_t scale, int64_t zero, int64_t i) {
        const auto* scales = static_cast<const uint8_t*>(c.group_scales);
        std::memcpy(out + scale, scales + i * scale_bytes, size_t(scale_bytes));
        out[zero] = c.zeros[i];
      });
      if (panel.tail_bytes() > 0)
        std::memcpy(out + panel.channel_scale(n), c.channel_scales + n, 4);
      if (panel.scheme == Scheme::kChannel) out[panel.channel_zero(n)] = c.zeros[n];
    }
  });
}

void unpack_panels(const uint8_t* w, const W4Panel& panel, const Canonical& c) {
  const int64_t row_bytes = panel.Kp / 2, scale_bytes = panel.scale_bytes();
  parallel_for(panel.N, panel.Kp / 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t k = 0; k < panel.Kp; k += W4Panel::kStepK) {
        uint32_t bytes;
        std::memcpy(&bytes, w + panel.code(n, k).byte, 4);
        const uint32_t codes = gather(bytes & 0x0f0f0f0f) | gather(bytes >> 4 & 0x0f0f0f0f) << 16;
        std::memcpy(c.codes + n * row_bytes + k / 2, &codes, 4);
      }
      each_group(panel, n, [&](int64_t scale, int64_t zero, int64_t i) {
        std::memcpy(static_cast<uint8_t*>(c.group_scales) + i * scale_bytes, w + scale,
                    size_t(scale_bytes));
        c.zeros[i] = w[zero];
      });
      if (panel.tail_bytes() > 0) std::memcpy(c.channel_scales + n, w + panel.channel_scale(n), 4);
      if (panel.scheme == Scheme::kChannel) c.zeros[n] = w[panel.channel_zero(n)];
    }
  });
}

}  // namespace tessella::w4ax_gemm
