# What the library is built from: the system's own packages first, otherwise a release that a hash pins.
include(FetchContent)
if(POLICY CMP0135) # what is unpacked has the time of unpacking, so that another version is built again
  cmake_policy(SET CMP0135 NEW)
endif()

find_package(Threads REQUIRED)

find_package(nlohmann_json 3.9 QUIET)
if(NOT nlohmann_json_FOUND)
  message(STATUS "nlohmann_json is downloaded: it is not installed (nlohmann-json3-dev)")
  FetchContent_Declare(
    nlohmann_json
    URL https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz
    URL_HASH SHA256=d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d)
  FetchContent_MakeAvailable(nlohmann_json)
endif()

# ONNX Runtime is opened by dlopen and never linked: its symbols carry the version of the release, so that a program
# linked to one release starts with no other. Of its package only the C header is needed, of any release since 1.21.
find_path(
  ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h
  PATH_SUFFIXES onnxruntime onnxruntime/core/session
  DOC "Folder of ONNX Runtime's onnxruntime_c_api.h")
if(NOT ONNXRUNTIME_INCLUDE_DIR)
  message(STATUS "onnxruntime_c_api.h is downloaded: it is not installed (libonnxruntime-dev), and "
                 "ONNXRUNTIME_INCLUDE_DIR does not name its folder")
  # The header is the same on every platform, and the archive has no CMakeLists.txt that would be added here.
  FetchContent_Declare(
    onnxruntime_headers
    URL https://github.com/microsoft/onnxruntime/releases/download/v1.23.2/onnxruntime-linux-x64-1.23.2.tgz
    URL_HASH SHA256=1fa4dcaef22f6f7d5cd81b28c2800414350c10116f5fdd46a2160082551c5f9b)
  FetchContent_MakeAvailable(onnxruntime_headers)
  set(ONNXRUNTIME_INCLUDE_DIR ${onnxruntime_headers_SOURCE_DIR}/include)
endif()
add_library(gircse_onnxruntime_headers INTERFACE)
target_include_directories(gircse_onnxruntime_headers SYSTEM INTERFACE ${ONNXRUNTIME_INCLUDE_DIR})
