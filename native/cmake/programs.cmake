# SPDX-License-Identifier: Apache-2.0
# Every tests/test_*.c and every bench/*.c is a program of its own. Tests are known to ctest under the name of
# their file; exit code 77 means "this machine lacks what the test needs" and counts as skipped.
enable_testing()

# The tests' and benches' other .c files are what they share, compiled once.
function(fl_programs folder pattern out)
  file(GLOB sources CONFIGURE_DEPENDS ${folder}/*.c)
  set(programs ${sources})
  list(FILTER programs INCLUDE REGEX "/${folder}/${pattern}$")
  list(REMOVE_ITEM sources ${programs})
  set(shared)
  if(sources)
    set(shared fl_${folder}_shared)
    add_library(${shared} STATIC ${sources})
    target_include_directories(${shared} PUBLIC ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/${folder})
    target_link_libraries(${shared} PUBLIC fl_flags frostline m)
  endif()
  set(names)
  foreach(program IN LISTS programs)
    get_filename_component(name ${program} NAME_WE)
    add_executable(${name} ${program})
    target_include_directories(${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/${folder})
    target_link_libraries(${name} PRIVATE ${shared} fl_flags frostline m)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/${folder})
    list(APPEND names ${name})
  endforeach()
  set(${out} ${names} PARENT_SCOPE)
endfunction()

# TSan's shadow memory does not fit a kernel that randomises addresses by 32 bits.
set(fl_launcher)
set(fl_test_environment "UBSAN_OPTIONS=print_stacktrace=1")
if(FL_SANITIZE STREQUAL "thread")
  find_program(FL_SETARCH setarch REQUIRED)
  set(fl_launcher ${FL_SETARCH} -R)
endif()

if(TARGET frostline-pager)
  list(APPEND fl_test_environment "FROSTLINE_PAGER=$<TARGET_FILE:frostline-pager>")
endif()
fl_programs(tests "test_[^/]*\\.c" fl_tests)
foreach(name IN LISTS fl_tests)
  add_test(NAME ${name} COMMAND ${fl_launcher} $<TARGET_FILE:${name}>)
  set_tests_properties(${name} PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT ${FL_TEST_SECONDS}
    ENVIRONMENT "${fl_test_environment}")
  # What changes the host's own state, or counts by it, is labelled: nothing else that does may run beside it.
  file(STRINGS tests/${name}.c of_host REGEX "#include \"(host_memory|tracked_guest|damon_field|idle_field)\\.h\"")
  if(of_host)
    set_tests_properties(${name} PROPERTIES LABELS host)
  endif()
endforeach()

fl_programs(bench "bench_[^/]*\\.c" fl_benches)
# Its guest can be the tests' KVM guest.
file(GLOB fl_trackers_guest CONFIGURE_DEPENDS bench/trackers/*.c)
target_sources(bench_trackers PRIVATE ${fl_trackers_guest})
target_link_libraries(bench_trackers PRIVATE fl_tests_shared)
