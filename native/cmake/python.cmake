# SPDX-License-Identifier: Apache-2.0
# The cffi extension frostline.native._frostline. Its declarations are taken from the public header.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.SABIModule)

set(fl_header ${CMAKE_CURRENT_SOURCE_DIR}/include/frostline.h)
set(fl_cdef ${CMAKE_CURRENT_BINARY_DIR}/frostline.cdef)
set(fl_prelude ${CMAKE_CURRENT_BINARY_DIR}/frostline.prelude)
set(fl_extension ${CMAKE_CURRENT_BINARY_DIR}/_frostline.c)
file(GLOB fl_headers CONFIGURE_DEPENDS include/*.h)
file(CONFIGURE OUTPUT ${fl_prelude} CONTENT "#include <frostline.h>\n" @ONLY)

add_custom_command(
  OUTPUT ${fl_cdef}
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/cmake/cdef.py
          --cc ${CMAKE_C_COMPILER} ${fl_header} ${fl_cdef}
  DEPENDS ${fl_headers} ${CMAKE_CURRENT_SOURCE_DIR}/cmake/cdef.py
  COMMENT "cffi declarations from frostline.h" VERBATIM)
add_custom_command(
  OUTPUT ${fl_extension}
  COMMAND ${Python_EXECUTABLE} -m cffi.gen_src read-sources
          frostline.native._frostline ${fl_cdef} ${fl_prelude} ${fl_extension}
  DEPENDS ${fl_cdef} ${fl_prelude}
  COMMENT "cffi extension source" VERBATIM)

# cffi's code is not ours to clean of warnings, so it takes none of our flags.
python_add_library(_frostline MODULE WITH_SOABI USE_SABI 3.11 ${fl_extension})
target_compile_definitions(_frostline PRIVATE _GNU_SOURCE)
target_compile_options(_frostline PRIVATE -w)
target_link_libraries(_frostline PRIVATE frostline)
install(TARGETS _frostline LIBRARY DESTINATION frostline/native COMPONENT python)
