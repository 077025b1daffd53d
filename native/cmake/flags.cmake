# SPDX-License-Identifier: Apache-2.0
# fl_flags: how our own C is compiled and linked. Sanitizers go to everything, so that they agree.
add_library(fl_flags INTERFACE)
target_compile_definitions(fl_flags INTERFACE _GNU_SOURCE FL_VERSION="${fl_version}")
target_compile_options(fl_flags INTERFACE
  -Wall -Wextra -Wshadow -Wundef -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wformat=2
  -fno-omit-frame-pointer -fno-strict-aliasing -fstack-protector-strong)
if(FL_WERROR)
  target_compile_options(fl_flags INTERFACE -Werror)
endif()

if(FL_SANITIZE STREQUAL "address")
  set(fl_sanitize -fsanitize=address,undefined -fno-sanitize-recover=all)
elseif(FL_SANITIZE STREQUAL "thread")
  set(fl_sanitize -fsanitize=thread)
elseif(NOT FL_SANITIZE STREQUAL "")
  message(FATAL_ERROR "FL_SANITIZE is '${FL_SANITIZE}'; it can be empty, address or thread")
endif()
if(fl_sanitize)
  add_compile_options(${fl_sanitize})
  add_link_options(${fl_sanitize})
  string(TOUPPER ${FL_SANITIZE} fl_sanitize_name)
  target_compile_definitions(fl_flags INTERFACE FL_SANITIZE_${fl_sanitize_name}=1)
endif()
