# SPDX-License-Identifier: Apache-2.0
"""The inputs that fuzzing starts with: real files, arguments, maps, rules and BTF; and inputs that failed once."""

from __future__ import annotations

import struct
from pathlib import Path

import imds_guard
from imds_guard.backends.ebpf.image import settings_of
from imds_guard.backends.ebpf.render import render
from imds_guard.backends.iptables.render import ResolvedPolicy
from imds_guard.backends.iptables.render import render as render_rules
from imds_guard.backends.iptables.tables import rule_texts
from imds_guard.policy.model import Identities, Lock, Policy, Verdict, make_policy
from tests.filter.test_corpus import read_corpus
from tests.fuzz.targets import bytes_of
from tests.kernel.guards import policy

SAMPLE = Path(imds_guard.__file__).parent / "data" / "config.toml"

_CONFIGS = (
    b'[lock.a]\nendpoints = ["169.254.169.254", "[fd00:ec2::254]:80+443,tcp"]\nusers = ["root", 5]\n',
    b'mode = "audit"\ncontainers = "allow"\non_error = "open"\nbackend = "ebpf"\ncgroup = "/x"\n'
    b'[lock."a b"]\npreset = "default"\nnobody = true\n[lock.b]\nendpoints = ["10.0.0.0/8:!53"]\n'
    b'deny_groups = [{ name = "root", id = 0 }]\ndefault = "allow"\n',
)
_ENDPOINTS = (
    *(
        b"169.254.169.254",
        b"169.254.169.254:80",
        b"10.0.0.0/8:!53,tcp",
        b"[fd00:ec2::254]/64:80+443",
        b"::ffff:1.2.3.4",
    ),
    *(b"fd00:ec2::254:80", b"1.2.3.4:8000-8100,any", b"[::ffff:10.0.0.0]/104:*", b"fe80::1%eth0", b"01.2.3.4", b"::/0"),
)


def several_locks() -> Policy:
    """Locks of IPv4 and IPv6 endpoints, with every kind of list."""
    one = policy(0, 61_001).locks[0]
    deny = Identities(frozenset({5}), frozenset({6, 7}))
    other = Lock(
        "b", policy(addresses=("10.0.0.0/8", "fd00::/8")).locks[0].endpoints, Identities(), deny, Verdict.ALLOW
    )
    return make_policy([one, other])


def _saved(chosen: Policy) -> bytes:
    found = ["*filter", ":OUTPUT ACCEPT [0:0]"]
    for version in (4, 6):
        chains = rule_texts(render_rules(ResolvedPolicy(chosen, None), version))
        found += [f":{chain} - [0:0]" for chain in chains]
        found += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    return "\n".join([*found, "-A OUTPUT -j IMDS-GUARD", "COMMIT", ""]).encode()


def _btf(types: bytes, strings: bytes) -> bytes:
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


def _cred() -> bytes:
    members = struct.pack("=3I", 6, 1, 64) + struct.pack("=3I", 12, 1, 96)
    return struct.pack("=3I", 0, 1 << 24, 4) + bytes(4) + struct.pack("=3I", 1, 4 << 24 | 2, 16) + members


def seeds() -> dict[str, list[bytes]]:
    """Name of the target -> its seeds."""
    image = render(several_locks(), 1)
    record = settings_of(several_locks()).pack(image.digest(), 1)
    configs = [SAMPLE.read_bytes(), *_CONFIGS]
    return {
        "config": configs,
        "endpoint": list(_ENDPOINTS),
        "lines": configs,
        "maps": [bytes_of(image, record)],
        "rules": [_saved(several_locks())],
        "btf": [_btf(_cred(), b"\0cred\0fsuid\0fsgid\0")],
        "event": [bytes(88), bytes(range(88))],
        "request": [case.sent for case in read_corpus() if len(case.sent) < 1000],
    }


_SHORT_BTF = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(_cred()), 0, 16) + _cred()[:50]

FOUND: tuple[tuple[str, bytes], ...] = (
    ("rules", b"*filter\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT\nCOMMIT\n"),  # a foreign rule that only counts
    ("rules", _saved(several_locks()).replace(b"lock=", b"lock=\xff")),
    ("btf", _btf(_cred()[:-3], b"\0cred\0fsuid\0")),
    ("btf", _btf(_cred(), b"\0cred\0fsuid")),
    ("btf", _SHORT_BTF),
    ("event", bytes(range(88))),  # an unknown reason
)
"""(target, input) that failed once."""
