# SPDX-License-Identifier: Apache-2.0
"""bpf(2) by ctypes: one function per command; integers and bytes in, integers and bytes out.

``attr`` has the numbers and structs, ``syscall`` makes the system call. Every failure is an OSError that carries the
errno; the caller says what it means.
"""

from imds_guard.kernel.bpf.attr import F_NO_PREALLOC, AttachType, Command, MapType, ProgType
from imds_guard.kernel.bpf.links import (
    MAX_PROGRAMS,
    AttachedPrograms,
    LinkDescription,
    Sharing,
    attached_programs,
    cgroup_links,
    describe_link,
    link_create,
    link_create_first,
    link_detach,
    link_update,
    links_of_cgroup,
    pin,
    pinned,
    programs_of_cgroup,
    running_programs,
)
from imds_guard.kernel.bpf.maps import (
    MapShape,
    describe_map,
    map_create,
    map_delete_all,
    map_items,
    map_lookup,
    map_update,
    map_update_all,
    possible_cpus,
)
from imds_guard.kernel.bpf.programs import (
    ProgramDescription,
    describe_program,
    enable_run_statistics,
    prog_load,
    prog_load_explained,
    program_by_id,
    programs_of_type,
)

__all__ = [
    "F_NO_PREALLOC",
    "MAX_PROGRAMS",
    "AttachType",
    "AttachedPrograms",
    "Command",
    "LinkDescription",
    "MapShape",
    "MapType",
    "ProgType",
    "ProgramDescription",
    "Sharing",
    "attached_programs",
    "cgroup_links",
    "describe_link",
    "describe_map",
    "describe_program",
    "enable_run_statistics",
    "link_create",
    "link_create_first",
    "link_detach",
    "link_update",
    "links_of_cgroup",
    "map_create",
    "map_delete_all",
    "map_items",
    "map_lookup",
    "map_update",
    "map_update_all",
    "pin",
    "pinned",
    "possible_cpus",
    "prog_load",
    "prog_load_explained",
    "program_by_id",
    "programs_of_cgroup",
    "programs_of_type",
    "running_programs",
]
