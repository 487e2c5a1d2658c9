# The kernels for a 910B, with CANN's compiler, and their PyTorch entry through torch_npu.
#
#   ASCEND_HOME_PATH  of a CANN toolkit, 8.0 or later (source its set_env.sh)
#   SOC_VERSION       Ascend910B1..B4, Ascend910B2C or ascend910_93*
# Each thing that is missing or does not fit ends the configuration with one message.

set(TESSELLA_NPU_SOCS "Ascend910B[1-4]|Ascend910B2C|[Aa]scend910_93.*")
set(ASCEND_HOME_PATH "$ENV{ASCEND_HOME_PATH}" CACHE PATH "the CANN toolkit")
set(SOC_VERSION "$ENV{SOC_VERSION}" CACHE STRING "the chip, as npu-smi names it")
if(NOT ASCEND_HOME_PATH OR NOT EXISTS "${ASCEND_HOME_PATH}")
  message(FATAL_ERROR "TESSELLA_ASCEND=NPU: no CANN toolkit: ASCEND_HOME_PATH is "
                      "'${ASCEND_HOME_PATH}'; source set_env.sh of CANN 8.0 or later")
endif()
if(NOT SOC_VERSION MATCHES "^(${TESSELLA_NPU_SOCS})$")
  message(FATAL_ERROR "TESSELLA_ASCEND=NPU: SOC_VERSION: expected Ascend910B1..B4, Ascend910B2C or "
                      "ascend910_93*, got '${SOC_VERSION}'")
endif()
set(ASCENDC_CMAKE_DIR "")
foreach(_dir tools/tikcpp/ascendc_kernel_cmake compiler/tikcpp/ascendc_kernel_cmake
    ascendc_devkit/tikcpp/samples/cmake)
  if(NOT ASCENDC_CMAKE_DIR AND EXISTS "${ASCEND_HOME_PATH}/${_dir}/ascendc.cmake")
    set(ASCENDC_CMAKE_DIR "${ASCEND_HOME_PATH}/${_dir}")
  endif()
endforeach()
if(NOT ASCENDC_CMAKE_DIR)
  message(FATAL_ERROR "TESSELLA_ASCEND=NPU: '${ASCEND_HOME_PATH}' has no ascendc.cmake: install "
                      "the toolkit with its kernel compiler, not the runtime alone")
endif()

# torch_npu follows torch: 2.13.0 goes with 2.13.*. Read from disk, since importing it needs CANN.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/host/find_torch_npu.py"
  OUTPUT_VARIABLE _found ERROR_VARIABLE _why RESULT_VARIABLE _failed
  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
if(_failed)
  message(FATAL_ERROR "TESSELLA_ASCEND=NPU: ${_why}")
endif()
list(GET _found 0 _torch_root)
list(GET _found 1 _npu_root)

set(RUN_MODE npu CACHE STRING "CANN's run mode")
set(ASCEND_CANN_PACKAGE_PATH "${ASCEND_HOME_PATH}" CACHE PATH "CANN, under the name its script has")
include("${ASCENDC_CMAKE_DIR}/ascendc.cmake")
ascendc_library(tessella_ascend_npu STATIC kernels/act_quant.cpp kernels/w4ax_gemm.cpp)
ascendc_include_directories(tessella_ascend_npu PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")

add_library(_ascend_npu MODULE host/npu.cpp host/npu_op.cpp tiling/plan.cpp)
target_include_directories(_ascend_npu PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/../csrc")
target_include_directories(_ascend_npu SYSTEM PRIVATE "${_torch_root}/include"
  "${_torch_root}/include/torch/csrc/api/include" "${_npu_root}/include"
  "${ASCEND_HOME_PATH}/include")
target_link_directories(_ascend_npu PRIVATE "${_torch_root}/lib" "${_npu_root}/lib"
  "${ASCEND_HOME_PATH}/lib64")
target_link_libraries(_ascend_npu PRIVATE tessella_ascend_npu torch torch_cpu c10 torch_npu
  ascendcl platform)
set_target_properties(_ascend_npu PROPERTIES PREFIX "" CXX_STANDARD 20 BUILD_WITH_INSTALL_RPATH ON
  INSTALL_RPATH "$ORIGIN/../torch/lib;$ORIGIN/../torch_npu/lib")
if(NOT CMAKE_SOURCE_DIR STREQUAL CMAKE_CURRENT_SOURCE_DIR)
  install(TARGETS _ascend_npu LIBRARY DESTINATION tessella)
endif()
