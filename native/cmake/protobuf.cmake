# SPDX-License-Identifier: Apache-2.0
# proto/frostline/v1/*.proto -> the typed package frostline.v1.
set(fl_proto_root ${CMAKE_CURRENT_SOURCE_DIR}/../proto)
set(fl_generated ${CMAKE_CURRENT_BINARY_DIR}/generated)
file(GLOB fl_protos CONFIGURE_DEPENDS ${fl_proto_root}/frostline/v1/*.proto)
set(fl_stamp ${CMAKE_CURRENT_BINARY_DIR}/protobuf.stamp)

add_custom_command(
  OUTPUT ${fl_stamp}
  COMMAND ${CMAKE_COMMAND} -E rm -rf ${fl_generated}
  COMMAND ${CMAKE_COMMAND} -E make_directory ${fl_generated}
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/cmake/protobuf.py
          --root ${fl_proto_root} --output ${fl_generated} ${fl_protos}
  COMMAND ${CMAKE_COMMAND} -E touch ${fl_stamp}
  DEPENDS ${fl_protos} ${CMAKE_CURRENT_SOURCE_DIR}/cmake/protobuf.py
  COMMENT "protobuf modules" VERBATIM)
add_custom_target(fl_protobuf ALL DEPENDS ${fl_stamp})
install(DIRECTORY ${fl_generated}/frostline/ DESTINATION frostline COMPONENT protobuf)
