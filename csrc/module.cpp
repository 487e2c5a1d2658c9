// _C: what this build is and would do, without torch: build info, kernels, plans, layout slots.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/build.h"
#include "core/env.h"
#include "cpu/ceilings.h"
#include "cpu/pages.h"
#include "families.h"
#include "layout/act.h"
#include "layout/kv.h"
#include "layout/mla.h"
#include "layout/w4.h"
#include "layout/w4_frag.h"
#include "msm/plan.h"
#include "w4ax_gemm/plan.h"
#include "w4ax_gemm/plan_sm90.h"

namespace py = pybind11;
using namespace tessella;

static py::dict build_info() {
  py::dict d;
  d["version"] = TESSELLA_VERSION;
  d["git"] = TESSELLA_GIT;
  d["compiler"] = "g++ " __VERSION__;
  d["cuda_version"] = TESSELLA_CUDA_VERSION;
  d["cuda"] = kHasCuda;
  py::list archs;
  const std::string all = TESSELLA_CUDA_ARCHS;
  for (size_t at = 0; at < all.size();) {
    const size_t comma = std::min(all.find(',', at), all.size());
    archs.append(all.substr(at, comma - at));
    at = comma + 1;
  }
  d["cuda_archs"] = archs;
  return d;
}

static py::dict cpu_isa() {
  refresh_env();
  py::dict d;
  std::vector<std::string> supported;
  for (Isa isa : all_isas())
    if (isa_supported(isa)) supported.push_back(isa_name(isa));
  d["best"] = isa_name(env().best_isa);
  d["supported"] = supported;
  d["bf16"] = has_bf16(env().best_isa);
  d["capped_by"] = env().capped_by.empty() ? py::object(py::none()) : py::str(env().capped_by);
  return d;
}

static py::dict kernels() {
  py::dict d;
  for (const Family& f : families()) d[py::str(f.first)] = f.second;
  return d;
}

static py::dict plan_w4ax_gemm(int64_t M, int64_t N, int64_t K, int threads,
                               const std::string& isa) {
  Isa i = env().best_isa;
  if (!isa.empty() && !parse_isa(isa, &i)) throw py::value_error("isa: unknown name '" + isa + "'");
  const w4ax_gemm::Problem problem{M, N, round_up(K, 128), threads};
  const w4ax_gemm::Plan plan = w4ax_gemm::plan(problem, i);
  py::dict d;
  d["kernel"] = std::string("w4ax_gemm.") + isa_name(i) + "." + plan.tile;
  d["tile"] = plan.tile;
  d["chunk_rows"] = plan.chunk_rows;
  d["tasks"] = plan.tasks;
  d["task_work"] = plan.task_work;
  return d;
}

static py::dict plan_w4ax_gemm_sm90(int64_t M, int64_t N, int64_t K, const std::string& scheme,
                                    int sms, const std::string& tile, bool stream, bool probe,
                                    bool wide) {
  const Scheme s = scheme == "channel" ? Scheme::kChannel
                   : scheme == "g128"  ? Scheme::kGroup
                                       : Scheme::kTwoLevel;
  const w4ax_gemm::GpuProblem problem{M, N, round_up(K, 128), s, sms, wide};
  const w4ax_gemm::Sm90Size size = w4ax_gemm::sm90_size(tile);
  if (!tile.empty() && size.tokens == 0) {
    std::string names;
    for (const auto& known : w4ax_gemm::kSm90Tiles) names += std::string(known.name) + ", ";
    throw py::value_error("tile: expected one of " + names + "got '" + tile + "'");
  }
  const w4ax_gemm::Sm90Plan plan = probe ? w4ax_gemm::plan_sm90_probe(problem, size)
                                   : stream
                                       ? w4ax_gemm::plan_sm90_with(problem, {size, 1, false, true})
                                       : w4ax_gemm::plan_sm90(problem, size);
  py::dict d;
  d["kernel"] = "w4ax_gemm.sm90." + w4ax_gemm::kernel_name(plan);
  d["tokens"] = plan.size.tokens;
  d["features"] = plan.size.features;
  d["stages"] = plan.stages;
  d["stream"] = plan.stream;
  d["split"] = plan.split;
  d["whole"] = plan.whole;
  d["tiles"] = plan.tiles;
  d["grid"] = plan.grid;
  d["smem"] = plan.smem;
  d["text"] = to_string(problem, plan);
  return d;
}

// A plan of attention as a list of its int32 words; msm/plan.h has the format.
static py::dict plan_msm(const std::vector<int32_t>& q_len, const std::vector<int32_t>& kv_len,
                         const std::vector<int32_t>& mask, int H, int J, int window, int units,
                         int64_t split) {
  std::vector<int32_t> cu_q(1, 0);
  for (int32_t q : q_len) cu_q.push_back(cu_q.back() + q);
  const msm::Problem problem{cu_q.data(), kv_len.data(), mask.data(), int64_t(q_len.size()), H, J,
                             window,      units,         split};
  const std::vector<int32_t> words = msm::plan(problem);
  py::dict d;
  d["words"] = words;
  d["text"] = to_string(msm::PlanView{words.data()});
  d["error"] = msm::plan_error(problem, words.data(), int64_t(words.size()));
  return d;
}

static py::dict measured_ceilings(int threads) {
  CpuCeilings c;
  {
    const py::gil_scoped_release unlocked;
    c = measure_ceilings(threads, env().best_isa);
  }
  py::dict d;
  d["isa"] = isa_name(env().best_isa);
  d["read_bytes_per_us"] = c.read_bytes_per_us;
  d["macs_per_us"] = c.macs_per_us;
  return d;
}

static layout::W4Panel panel(const std::string& scheme, int64_t N, int64_t K) {
  const bool group = scheme[0] == 'g';
  return {scheme == "channel" ? Scheme::kChannel
          : group             ? Scheme::kGroup
                              : Scheme::kTwoLevel,
          N, round_up(K, 128), group ? std::stoi(scheme.substr(1)) : 128};
}

// (k_bits, v_bits, Z, D, G, channel)
using KvArgs = std::tuple<int, int, int64_t, int64_t, int64_t, bool>;
static layout::KvPage kv_page(const KvArgs& a) {
  return std::apply([](auto... x) { return layout::KvPage{x...}; }, a);
}

// (latent_bits, rope_bits, Z, L, R)
using MlaArgs = std::tuple<int, int, int64_t, int64_t, int64_t>;
static layout::MlaPage mla_page(const MlaArgs& a) {
  return std::apply([](auto... x) { return layout::MlaPage{x...}; }, a);
}

// Layout slots, for the test that compares them with tessella.layout index by index.
static void bind_layouts(py::module_& m) {
  m.def("w4_bytes",
        [](const std::string& s, int64_t N, int64_t K) { return panel(s, N, K).bytes(); });
  m.def("w4_code_slot", [](const std::string& s, int64_t N, int64_t K, int64_t n, int64_t k) {
    const layout::Slot slot = panel(s, N, K).code(n, k);
    return std::make_pair(slot.byte, slot.shift);
  });
  m.def("w4_group_slots", [](const std::string& s, int64_t N, int64_t K, int64_t n, int64_t g) {
    return std::make_pair(panel(s, N, K).group_scale(n, g), panel(s, N, K).group_zero(n, g));
  });
  m.def("w4_channel_slots", [](const std::string& s, int64_t N, int64_t K, int64_t n) {
    return std::make_pair(panel(s, N, K).channel_scale(n), panel(s, N, K).channel_zero(n));
  });
  m.def("w4_frag_code_slot", [](const std::string& s, int64_t N, int64_t K, int64_t n, int64_t k) {
    const layout::Slot slot = layout::W4Frag(panel(s, N, K)).code(n, k);
    return std::make_pair(slot.byte, slot.shift);
  });
  m.def("w4_frag_group_slots",
        [](const std::string& s, int64_t N, int64_t K, int64_t n, int64_t g) {
          const layout::W4Frag w(panel(s, N, K));
          return std::make_pair(w.group_scale(n, g), w.group_zero(n, g));
        });
  m.def("act_code_slot", [](int64_t M, int64_t K, int64_t K8, int64_t mm, int64_t k) {
    const layout::Slot slot = layout::ActBlocks{M, round_up(K, 128), K8}.code(mm, k);
    return std::make_pair(slot.byte, slot.shift);
  });
  m.def("kv_bytes", [](const KvArgs& a) { return kv_page(a).bytes(); });
  m.def("kv_code_slots", [](const KvArgs& a, int64_t t, int64_t d) {
    const layout::Slot k = kv_page(a).k_code(t, d), v = kv_page(a).v_code(t, d);
    return std::make_tuple(k.byte, k.shift, v.byte, v.shift);
  });
  m.def("kv_row_slots", [](const KvArgs& a, int64_t t, int64_t d) {
    const layout::KvPage p = kv_page(a);
    return std::make_tuple(p.k_scales() + p.k_row(t, d), p.k_zeros() + p.k_row(t, d),
                           p.v_scales() + p.v_row(t, d), p.v_zeros() + p.v_row(t, d));
  });
  m.def("mla_bytes", [](const MlaArgs& a) { return mla_page(a).bytes(); });
  m.def("mla_slots", [](const MlaArgs& a, int64_t t, int64_t d) {
    const layout::MlaPage p = mla_page(a);
    return std::make_tuple(p.latent(t, d).byte, p.latent(t, d).shift, p.rope_at(t, d), p.scale(t),
                           p.rope_scale(t));
  });
  m.attr("W4_LAYOUT_VERSION") = int(layout::W4Panel::kVersion);
}

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "What this build of tessella is and would do; needs no torch.";
  m.def("build_info", &build_info, "Version, compiler, CUDA version and GPU architectures.");
  m.def("cpu_isa", &cpu_isa, "Best instruction set in use, those supported, and the cap.");
  m.def("kernels", &kernels,
        "Every compiled kernel: family -> names, as TESSELLA_FORCE takes them.");
  m.def("plan_w4ax_gemm", &plan_w4ax_gemm, py::arg("M"), py::arg("N"), py::arg("K"),
        py::arg("threads") = 1, py::arg("isa") = "", "The plan for one problem on CPU.");
  m.def(
      "plan_w4ax_gemm_sm90", &plan_w4ax_gemm_sm90, py::arg("M"), py::arg("N"), py::arg("K"),
      py::arg("scheme") = "twolevel", py::arg("sms") = 132, py::arg("tile") = "",
      py::arg("stream") = false, py::arg("probe") = false, py::arg("wide") = false,
      "The plan for one problem on Hopper; with `tile` (128, 128x192), of that one; with `stream` "
      "too, the one that deals out K in equal shares; with `probe`, the one that measures "
      "decoding, for two-level weights or, with `wide`, widened ones.");
  m.def(
      "advise_huge_pages",
      [](uintptr_t data, size_t bytes) { advise_huge_pages(reinterpret_cast<void*>(data), bytes); },
      py::arg("data"), py::arg("bytes"));
  m.def("plan_msm", &plan_msm, py::arg("q_len"), py::arg("kv_len"), py::arg("mask"), py::arg("H"),
        py::arg("J"), py::arg("window") = 0, py::arg("units") = 1, py::arg("split") = 0,
        "The plan of attention for one batch, on any device.");
  m.def("measure_ceilings", &measured_ceilings, py::arg("threads") = 1,
        "Measured read rate and 8-bit dot product rate of this CPU; takes about a second.");
  bind_layouts(m);
}
