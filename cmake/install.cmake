# What an embedder gets: the library, its header, and how to find both with CMake and with pkg-config.
include(CMakePackageConfigHelpers)
set(lf_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/lumiere_fast")

install(TARGETS lumiere_fast EXPORT lumiere_fast
  RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}"
  LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}"
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(FILES csrc/include/lumiere_fast.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")

install(EXPORT lumiere_fast NAMESPACE lumiere_fast:: FILE lumiere_fastTargets.cmake DESTINATION "${lf_package_dir}")
configure_package_config_file(cmake/lumiere_fastConfig.cmake.in lumiere_fastConfig.cmake
  INSTALL_DESTINATION "${lf_package_dir}" NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file(lumiere_fastConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  "${CMAKE_CURRENT_BINARY_DIR}/lumiere_fastConfig.cmake"
  "${CMAKE_CURRENT_BINARY_DIR}/lumiere_fastConfigVersion.cmake"
  DESTINATION "${lf_package_dir}")

# Relative to the file itself: `cmake --install --prefix` may put it anywhere.
file(RELATIVE_PATH lf_prefix "${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig" "${CMAKE_INSTALL_PREFIX}")
set(lf_pc_cflags "")
set(lf_pc_libs "")
if(NOT BUILD_SHARED_LIBS)
  set(lf_pc_cflags " -DLF_STATIC")
  set(lf_pc_libs " -pthread")
  foreach(library IN LISTS lf_runtime)
    string(APPEND lf_pc_libs " -l${library}")
  endforeach()
  if(lf_cuda)
    string(APPEND lf_pc_libs " ${CUDA_cudart_static_LIBRARY} -ldl -lrt")
  endif()
endif()
configure_file(cmake/lumiere_fast.pc.in lumiere_fast.pc @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/lumiere_fast.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
