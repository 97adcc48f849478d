# SPDX-License-Identifier: Apache-2.0
"""A machine in user space that runs the instructions that bcc compiled, as the kernel would.

It is much faster than a kernel test, needs no privilege, and reaches states that no kernel test can make:
each helper failing in turn, a change of policy in the middle of a run, every field of every record. It says nothing
about the verifier, the JIT and the kernel's own hooks: tests/kernel, tests/conformance and the matrix do.

    machine = Machine()                              # every form of every hook, empty maps
    machine.load(policy)                             # by the real renderer, generation 1
    machine.set_tasks([Task(1000, 100, groups=(4, 27))])
    outcome = machine.attempt("plain", Attempt("connect4", packed("169.254.169.254"), 80), task=0)
    assert outcome.allowed and outcome.reason == "allowed-user" and not outcome.traps

**What an outcome has** (values.py): returned, counts, events and the last record, the row of the report, the mark of
the socket, and traps: what a program must never do (structs.py: Trap). A trap that a test does not expect fails it;
``Outcome`` compares all of that and nothing else, so outcomes of different forms are equal.

**More than one run:** ``machine.cross(form, attempts, tasks)`` runs each attempt with each task in C, half a million
runs or more in a second.

**What goes wrong:** ``machine.trace()`` has the calls of the last run. ``failing(n)`` makes call n fail, and
``Controls(fail_load=n)`` plain load n:

    for number, call in enumerate(machine.trace(), 1):
        if call.can_fail:
            machine.attempt(form, attempt, controls=failing(number))

**What happens meanwhile:** ``Controls(before_call=f, at_call=n)`` runs f before call n. It may change maps
(map_update(), map_delete()), as another CPU would. What the program has found already stays readable;
``machine.reuse_freed(True)`` has its memory used again, as hashes do since Linux 6.1. ``with machine.rollback():``
undoes all changes of maps, those of the program too, so many runs can begin in one state.

**Packets:** ``machine.set_sockets([Socket(...)])``, then ``machine.packet(form, Packet(data, socket=0))``. Look-ups
compare the whole tuple with local and remote address and port. ``machine.packets()`` runs many in C (egress.py).

**Instructions:** ``machine.instructions(form, hook)``, ``machine.coverage(form, hook)``, and ``with
machine.patched(form, hooks, at, instruction):`` for mutants.

**Other kernels:** ``Machine(offsets=...)`` lays the task out as another kernel does. layouts.py has recorded ones.

| file | content |
| --- | --- |
| machine.py, values.py | what tests use |
| programs.py | the hooks in each form, by the loader's own functions |
| model.py, decisions.py | what a connect must leave behind, and many connects compared with it |
| generate.py, shrink.py, show.py | random cases; a case that fails made smaller, and in words |
| failing.py | calls that fail, on every path |
| coverage.py, lines.py | what the tests execute, and the line of source of each instruction |
| mutants.py, mutate.py, replay.py | one-instruction mutants, and the runs that must find them: a command of its own |
| reference.py, in_kernel.py | what the machine itself is compared with |
| planted.py | faults that tests must find |
| layouts.py, layouts.json | other kernels' structs |
| map_calls.py, command_calls.py | bpf(2) on the maps and hooks of machines: what commands do there is recorded |
| moments.py, timeline.py | hooks at every moment of what was recorded, and what may come out there |
| changes.py, commands.py | random changes of policy by the real store, and by whole commands |
| structs.py, library.py | the boundary to C; the library is compiled once into a folder in the temporary directory |
| c/interpreter.c | instructions |
| c/memory.c | objects and their bounds |
| c/maps.c, c/map_hash.c | maps: a kind of map is one row of KINDS |
| c/helpers.c | helpers: each is a function and a row of HELPERS |
| c/kernel.c | tasks, sockets, contexts |
| c/journal.c | changes that are undone |
| c/run.c | one run, and many |
| c/replay.c | runs that are repeated with another instruction |

A new hook needs its context in kernel.c and a way to start it in run.c. A context that a hook may write to gets
MAY_WRITE in vm_tasks_reset().
"""
