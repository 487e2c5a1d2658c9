#include "core/env.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>

#include "families.h"

namespace tessella {

static std::string read(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

static std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  for (size_t at = 0; at <= list.size();) {
    const size_t comma = std::min(list.find(',', at), list.size());
    if (comma > at) parts.push_back(list.substr(at, comma - at));
    at = comma + 1;
  }
  return parts;
}

static std::string unknown(const char* name, const std::string& got,
                           const std::vector<std::string>& valid) {
  std::string text = std::string(name) + ": expected one of ";
  for (size_t i = 0; i < valid.size(); ++i) text += (i ? ", " : "") + valid[i];
  return text + "; got '" + got + "'";
}

static Env read_env() {
  Env e;
  e.capped_by = read("TESSELLA_CPU_ISA");
  Isa cap = all_isas().front();
  if (!e.capped_by.empty() && !parse_isa(e.capped_by, &cap)) {
    std::vector<std::string> names;
    for (Isa isa : all_isas()) names.push_back(isa_name(isa));
    e.error = unknown("TESSELLA_CPU_ISA", e.capped_by, names);
  }
  e.best_isa = all_isas().back();
  for (Isa isa : all_isas())
    if (isa >= cap && isa_supported(isa)) {
      e.best_isa = isa;
      break;
    }
  e.force = split(read("TESSELLA_FORCE"));
  const std::vector<std::string> kernels = all_kernels();
  for (const std::string& name : e.force) {
    bool known = false;
    for (const std::string& k : kernels) known |= k == name;
    if (!known) e.error = unknown("TESSELLA_FORCE", name, kernels);
  }
  const std::string log = read("TESSELLA_LOG");
  if (!log.empty() && log != "plan") e.error = unknown("TESSELLA_LOG", log, {"plan"});
  e.log_plan = log == "plan";
  const std::string programmatic = read("TESSELLA_PDL");
  if (!programmatic.empty() && programmatic != "0" && programmatic != "1")
    e.error = unknown("TESSELLA_PDL", programmatic, {"0", "1"});
  e.programmatic = programmatic != "0";
  const std::string debug = read("TESSELLA_DEBUG");
  if (!debug.empty() && debug != "0" && debug != "1")
    e.error = unknown("TESSELLA_DEBUG", debug, {"0", "1"});
  e.debug = debug == "1";
  return e;
}

static Env& cached() {
  static Env e = read_env();
  return e;
}

const Env& env() { return cached(); }

const std::string& refresh_env() {
  cached() = read_env();
  return cached().error;
}

void log_plan(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string> seen;
  if (!env().log_plan) return;
  const std::lock_guard<std::mutex> lock(mutex);
  if (seen.insert(line).second) std::fprintf(stderr, "tessella plan: %s\n", line.c_str());
}

std::string forced_kernel(const std::string& family) {
  for (const std::string& name : env().force)
    if (name.compare(0, family.size() + 1, family + ".") == 0) return name;
  return "";
}

}  // namespace tessella

extern "C" const char* tessella_refresh_env() { return tessella::refresh_env().c_str(); }
