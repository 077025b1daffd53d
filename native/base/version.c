/* SPDX-License-Identifier: Apache-2.0 */
#include <frostline.h>

const char *fl_version(void) {
    return FL_VERSION; /* from pyproject.toml, by way of CMake */
}
