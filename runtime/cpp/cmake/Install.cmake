# A prefix that can be moved: nothing that is installed holds an absolute path.
include(CMakePackageConfigHelpers)

if(APPLE)
  set(origin @loader_path)
else()
  set(origin $ORIGIN)
endif()
# Where ONNX Runtime lies next to the library, dlopen finds it without any setting.
set_target_properties(gircse PROPERTIES INSTALL_RPATH ${origin})

install(
  TARGETS gircse
  EXPORT gircseTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/gircse DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(TARGET gircse-embed-cpp)
  file(RELATIVE_PATH to_library ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})
  set_target_properties(gircse-embed-cpp PROPERTIES INSTALL_RPATH ${origin}/${to_library})
  install(TARGETS gircse-embed-cpp RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/gircse)
install(
  EXPORT gircseTargets
  NAMESPACE gircse::
  DESTINATION ${package})
configure_package_config_file(cmake/gircseConfig.cmake.in gircseConfig.cmake INSTALL_DESTINATION ${package})
write_basic_package_version_file(gircseConfigVersion.cmake COMPATIBILITY SameMajorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/gircseConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/gircseConfigVersion.cmake
        DESTINATION ${package})

file(RELATIVE_PATH to_includes ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_FULL_INCLUDEDIR})
configure_file(cmake/gircse.pc.in gircse.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/gircse.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
