# Compile through ccache where it is found, but in a language whose launcher somebody has set (to nothing too). To be
# included when all languages are enabled and before there is a target.
find_program(LF_CCACHE_PROGRAM ccache)
mark_as_advanced(LF_CCACHE_PROGRAM)
if(LF_CCACHE_PROGRAM)
  foreach(language IN ITEMS C CXX CUDA)
    if(NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER "${LF_CCACHE_PROGRAM}")
    endif()
  endforeach()
  message(STATUS "Compiling through ${LF_CCACHE_PROGRAM}")
endif()
