# SPDX-License-Identifier: Apache-2.0
"""Which requests a filter passes on: the one reading of a path, patterns, headers, built-in rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.errors import BadPolicy
from imds_guard.policy.filters import FilterRules
from imds_guard.policy.header_rules import Headers
from imds_guard.policy.path_pattern import parse_pattern
from imds_guard.policy.request_target import BadRequest, parse_target
from imds_guard.policy.requests import Judge, Outcome, Request

# --- the target of a request


@pytest.mark.parametrize(
    ("raw", "segments", "sent"),
    [
        (b"/", (), "/"),
        (b"/latest", ("latest",), "/latest"),
        (b"/latest/", ("latest",), "/latest/"),
        (b"/a/b%2Dc/d", ("a", "b-c", "d"), "/a/b-c/d"),
        (b"/%6c%61test/meta-data", ("latest", "meta-data"), "/latest/meta-data"),
        (b"/macs/02:29:96:8f:6a:2d/", ("macs", "02:29:96:8f:6a:2d"), "/macs/02:29:96:8f:6a:2d/"),
        (b"/tags/a+b=c,d@e.f", ("tags", "a+b=c,d@e.f"), "/tags/a+b=c,d@e.f"),
        (b"/a?b=%2F&c=%c3%a9", ("a",), "/a?b=%2F&c=%c3%a9"),
        (b"/a?", ("a",), "/a?"),
        (b"/...", ("...",), "/..."),
    ],
)
def test_a_target_is_sent_on_as_it_was_understood(raw: bytes, segments: tuple[str, ...], sent: str) -> None:
    target = parse_target(raw)
    assert (target.segments, str(target)) == (segments, sent)


@pytest.mark.parametrize(
    "raw",
    [
        *(
            b"",
            b"latest",
            b"*",
            b"http://169.254.169.254/latest",
            b"169.254.169.254:80",
            b"//latest",
            b"/a//b",
            b"/a//",
        ),
        *(b"/a/./b", b"/a/../b", b"/..", b"/.", b"/a/%2e%2e/b", b"/a/.%2E", b"/a/%2e", b"/a%2fb", b"/a%2Fb", b"/a%5cb"),
        *(
            b"/a\\b",
            b"/a%00",
            b"/a\x00",
            b"/a%25",
            b"/a%252fb",
            b"/a%",
            b"/a%2",
            b"/a%zz",
            b"/a%+1",
            b"/a;b",
            b"/a;v=1/b",
        ),
        *(b"/a%3bb", b"/\xc3\xa9", b"/%c3%a9", b"/%ff", b"/a b", b"/a%20b", b"/a\tb", b"/a%09", b"/a\rb", b"/a%0d%0ab"),
        *(b"/a#b", b"/a%23b", b"/a%3fb", b"/a?b#c", b"/a?b c", b"/a?b;c", b"/a?\xc3\xa9", b"/a?%", b"/a?%2", b"/a?%00"),
        *(b"/a?b=%0d%0aX:y", b"/a?b=%7f", b"/a?b\\c", b"/a<b>", b'/a"b', b"/a{b}", b"/a|b", b"/a^b", b"/a`b", b"/a[b]"),
        b"/" + b"/".join([b"a"] * 65),
    ],
)
def test_a_target_that_two_servers_may_read_differently_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_target(raw)


@given(st.binary(max_size=40) | st.text("/.%2efF5cC?&=;\\ab", max_size=30).map(str.encode))
def test_what_is_sent_on_means_the_same_when_it_is_read_again(raw: bytes) -> None:
    """Whatever a server decodes, collapses or resolves: nothing is left in the path to do that with."""
    try:
        target = parse_target(raw if raw.startswith(b"/") else b"/" + raw)
    except BadRequest:
        return
    assert parse_target(str(target).encode()) == target
    assert "%" not in target.path
    assert not {"", ".", ".."} & set(target.segments)


# --- patterns


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("/a", "/a", True),
        ("/a", "/a/", True),
        ("/a/", "/a", True),
        ("/a", "/a/b", False),
        ("/a", "/A", False),
        ("/a", "/ab", False),
        ("/", "/", True),
        ("/", "/a", False),
        ("/*", "/a", True),
        ("/*", "/", False),
        ("/*", "/a/b", False),
        ("/*/b", "/a/b", True),
        ("/*/b", "/b", False),
        ("/*/b", "/a/a/b", False),
        ("/a/**", "/a", True),
        ("/a/**", "/a/", True),
        ("/a/**", "/a/b/c/d", True),
        ("/a/**", "/ab", False),
        ("/a/**", "/", False),
        ("/**", "/", True),
        ("/**", "/a/b", True),
        ("/*/m/**", "/x/m", True),
        ("/*/m/**", "/m", False),
    ],
)
def test_a_pattern_means_paths_by_their_segments(pattern: str, path: str, expected: bool) -> None:
    assert parse_pattern(pattern).matches(parse_target(path.encode()).segments) is expected


@pytest.mark.parametrize(
    ("pattern", "path", "touches", "covers"),
    [
        ("/a/**", "/", True, False),
        ("/a/**", "/a", True, True),
        ("/a/**", "/a/b", True, True),
        ("/a/b", "/a", True, False),
        ("/a/b", "/a/b", True, False),
        ("/a/b", "/a/b/c", False, False),
        ("/*/b/c", "/a", True, False),
        ("/*/b/c", "/a/x", False, False),
        ("/**", "/a", True, True),
    ],
)
def test_a_pattern_and_everything_below_a_path(pattern: str, path: str, touches: bool, covers: bool) -> None:
    segments = parse_target(path.encode()).segments
    assert (parse_pattern(pattern).touches(segments), parse_pattern(pattern).covers(segments)) == (touches, covers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not a path"),
        ("latest", "is not a path"),
        ("get /a", "'get' is not a method"),
        ("TRACE /a", "'TRACE' is not a method"),
        ("CONNECT /a", "'CONNECT' is not a method"),
        ("HEAD /a", "write GET"),
        ("GET  /a", "is not a path"),
        ("/a?b", "without a query"),
        ("/a%2db", "without percent-encoding"),
        ("/a/../b", "dot segment"),
        ("/a//b", "empty segment"),
        ("/a*", r"\* stands for a whole segment"),
        ("/**/a", r"\* stands for a whole segment"),
        ("/***", r"\* stands for a whole segment"),
        ("/é", "outside|not allowed"),
    ],
)
def test_a_pattern_that_is_none_is_refused(text: str, expected: str) -> None:
    with pytest.raises(BadPolicy, match=expected):
        parse_pattern(text)


# --- rules


def judged(rules: FilterRules, line: str, *headers: tuple[str, str]) -> Outcome:
    method, _, target = line.partition(" ")
    return Judge(rules).judge(Request(method, parse_target(target.encode()), headers))


REGION = FilterRules(
    ("GET /*/meta-data/placement/**", "GET /*/meta-data/instance-id", "PUT /latest/api/token", "/*/dynamic/**"),
    ("/*/meta-data/iam/**", "GET /*/meta-data/placement/partition-number", "/*/dynamic/Secret"),
)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("GET /latest/meta-data/placement/region", ""),
        ("HEAD /latest/meta-data/placement/region", ""),
        ("GET /2009-04-04/meta-data/placement", ""),
        ("GET /latest/meta-data/instance-id/", ""),
        ("PUT /latest/api/token", ""),
        ("GET /latest/dynamic/x", ""),
        ("HEAD /latest/dynamic/x", ""),
        ("PUT /latest/dynamic/x", "no allow rule"),
        ("POST /latest/meta-data/placement/region", "no allow rule"),
        ("get /latest/meta-data/placement/region", "no allow rule"),
        ("GET /latest/api/token", "no allow rule"),
        ("GET /latest/meta-data/", "no allow rule"),
        ("GET /", "no allow rule"),
        ("GET /LATEST/META-DATA/placement", "no allow rule"),
        ("GET /latest/meta-data/iam/security-credentials/x", "deny: /*/meta-data/iam/**"),
        ("GET /2009-04-04/meta-data/iam/", "deny: /*/meta-data/iam/**"),
        ("GET /latest/Meta-Data/IAM/info", "deny: /*/meta-data/iam/**"),
        ("PUT /latest/meta-data/iam", "deny: /*/meta-data/iam/**"),
        ("GET /latest/meta-data/placement/partition-number", "deny: GET /*/meta-data/placement/partition-number"),
        ("HEAD /latest/meta-data/placement/Partition-Number/", "deny: GET /*/meta-data/placement/partition-number"),
        ("GET /latest/dynamic/sEcret", "deny: /*/dynamic/Secret"),
    ],
)
def test_deny_beats_allow_and_nothing_matched_is_refused(line: str, rule: str) -> None:
    assert judged(REGION, line) == (Outcome(403, rule) if rule else Outcome(0))


GCP = FilterRules(
    ("GET /computeMetadata/v1/instance/**", "GET /computeMetadata/v1/project/project-id"),
    ("/computeMetadata/*/instance/service-accounts/**",),
)
V1 = "/computeMetadata/v1"


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (f"GET {V1}/instance/", ""),
        (f"GET {V1}/instance/zone", ""),
        (f"GET {V1}/instance/zone?alt=text", ""),
        (f"GET {V1}/project/project-id?wait_for_change=true&last_etag=0", ""),
        (f"GET {V1}/instance/disks/?recursive=true", ""),
        (f"GET {V1}/instance/disks/?recursive=true&alt=json&wait_for_change=true", ""),
        (f"GET {V1}/instance/?recursive=true", "deny: /computeMetadata/*/instance/service-accounts/**"),
        (f"GET {V1}/instance?recursive=false", "deny: /computeMetadata/*/instance/service-accounts/**"),
        (f"GET {V1}/instance?Recursive", "deny: /computeMetadata/*/instance/service-accounts/**"),
        (f"GET {V1}/instance?a=b&%72ecursive=1", "deny: /computeMetadata/*/instance/service-accounts/**"),
        (f"GET {V1}/instance/?alt=json", "deny: /computeMetadata/*/instance/service-accounts/**"),
        (f"GET {V1}/instance/?wait_for_change=true", "deny: /computeMetadata/*/instance/service-accounts/**"),
        (f"GET {V1}/?recursive=true", "deny: /computeMetadata/*/instance/service-accounts/**"),
        (f"GET {V1}/project/?recursive=true", "no allow rule"),
        (f"GET {V1}/project/project-id?recursive=true", "no allow rule"),
    ],
)
def test_a_query_that_widens_the_answer_is_judged_as_the_subtree(line: str, rule: str) -> None:
    assert judged(GCP, line) == (Outcome(403, rule) if rule else Outcome(0))


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("GET /metadata/instance/compute/location?api-version=2021-02-01", True),
        ("GET /metadata/instance/compute/userData", False),
        ("GET /metadata/instance/compute?api-version=2021-02-01", False),
        ("GET /metadata/instance?api-version=2021-02-01", False),
        ("GET /Metadata/Instance/compute", False),
        ("GET /metadata/instance/network", True),
    ],
)
def test_a_service_that_answers_with_everything_below_is_judged_so(line: str, allowed: bool) -> None:
    rules = FilterRules(("GET /metadata/instance/**",), ("/metadata/instance/compute/userData",))
    assert judged(rules, line).allowed is allowed


def test_imdsv2_is_required() -> None:
    rules = FilterRules(("GET /**", "PUT /latest/api/token"), require_imdsv2=True)
    token = ("x-aws-ec2-metadata-token", "AQAE")
    assert judged(rules, "GET /latest/meta-data/", token).allowed
    assert judged(rules, "PUT /latest/api/token", ("x-aws-ec2-metadata-token-ttl-seconds", "60")).allowed
    for headers in ((), ((token[0], ""),), (token, token)):
        assert judged(rules, "GET /latest/meta-data/", *headers) == Outcome(403, "require_imdsv2")
    assert judged(rules, "GET /latest/api/token") == Outcome(403, "require_imdsv2")


# --- headers, row by row as ec2-metadata-filter answers

AGENT = ("user-agent", "aws-cli/1.15.71 Python/3.5.2")
FLAVOR = ("metadata-flavor", "Amazon")
XFF = "x-forwarded-for"


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ((), False),
        ((AGENT,), True),
        ((("user-agent", "aws-sdk-go/1.0"),), True),
        ((("user-agent", "aws-chalice/1"),), True),
        ((("user-agent", "Boto3/1.9"),), True),
        ((("user-agent", "Botocore/1.12"),), True),
        ((("user-agent", "Cloud-Init/18.4"),), True),
        ((("user-agent", "cloud-init/18.4"),), False),
        ((("user-agent", "curl/7.58"),), False),
        ((("user-agent", "x aws-cli/1"),), False),
        ((("user-agent", ""),), False),
        ((FLAVOR,), True),
        ((FLAVOR, ("user-agent", "curl/7.58")), True),
        ((("metadata-flavor", "amazon"),), False),
        ((("metadata-flavor", "Google"),), False),
        ((("metadata-flavor", "Google"), AGENT), True),
        (((XFF, "10.0.0.1"), AGENT), False),
        (((XFF, "10.0.0.1"), FLAVOR), False),
        (((XFF, ""), AGENT), True),
        # Stricter than the original, which looks at the first line alone.
        (((XFF, ""), (XFF, "10.0.0.1"), AGENT), False),
        (((XFF, ""), (XFF, ""), AGENT), False),
        ((FLAVOR, FLAVOR), False),
        ((FLAVOR, ("metadata-flavor", "Google")), False),
        ((AGENT, ("user-agent", "curl/7.58")), False),
    ],
)
def test_headers_are_judged_as_by_ec2_metadata_filter(headers: Headers, allowed: bool) -> None:
    outcome = judged(FilterRules(("GET /**",), headers="ec2-metadata-filter"), "GET /latest/meta-data/", *headers)
    assert (outcome.status, outcome.rule.partition(":")[0]) == ((0, "") if allowed else (400, "headers"))


def test_user_agents_replace_those_of_the_program() -> None:
    rules = FilterRules(("GET /**",), headers="ec2-metadata-filter", user_agents=("curl/",))
    assert judged(rules, "GET /a", ("user-agent", "curl/7.58")).allowed
    assert judged(rules, "GET /a", AGENT) == Outcome(400, "headers: User-Agent")


# --- built-in sets

SECRETS = [
    *("/latest/meta-data/iam/security-credentials/role", "/1.0/meta-data/iam/info", "/2021-07-15/user-data"),
    *("/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance", "/latest/user-data/"),
    *("/latest/dynamic/instance-identity/pkcs7", "/latest/dynamic/instance-identity/signature"),
    *("/latest/meta-data/ram/security-credentials/x", "/latest/meta-data/cam/security-credentials/x"),
    *(f"{V1}/instance/service-accounts/default/token", f"{V1}/instance/service-accounts/", f"{V1}/?recursive=true"),
    *(f"{V1}/instance/service-accounts/default/identity?audience=x", "/computeMetadata/v1beta1/instance/attributes/"),
    *(f"{V1}/instance/?recursive=true&alt=json", f"{V1}/instance/attributes/kube-env", "/0.1/meta-data/attributes/x"),
    *(f"{V1}/instance/gce-workload-certificates/workload-identities", f"{V1}/project/?recursive=true"),
    *("/metadata/identity/oauth2/token?resource=x", "/metadata/identity/info", "/metadata/attested/document"),
    *("/metadata/instance?api-version=2021-02-01", "/metadata/instance/compute", "/metadata/instance/compute/userData"),
    *("/openstack/latest/user_data", "/openstack/2018-08-27/password", "/openstack/2012-08-10/user_data"),
    *("/openstack/latest/vendor_data.json", "/openstack/2016-10-06/vendor_data2.json", "/openstack/latest/securitykey"),
    # Paths of one segment: Azure's WireServer, Scaleway.
    *("/machine/?comp=goalstate", "/conf?format=json", "/user_data", "/openstack/content/0000"),
    *("/latest/dynamic/instance-identity/rsa2048/x", "/openstack/latest/user_data/x"),
    # Trees that the set does not know: Oracle, DigitalOcean, ECS, EKS.
    *(
        "/opc/v2/instance/",
        "/opc/v2/identity/cert.pem",
        "/metadata/v1/user-data",
        "/v2/credentials/x",
        "/v1/credentials",
    ),
]
HARMLESS = [
    *("/", "/latest/", "/latest/meta-data/", "/latest/meta-data/placement/region", "/1.0/meta-data/instance-id"),
    *("/latest/dynamic/instance-identity/document", "/latest/meta-data/tags/instance/Name", "/openstack"),
    *("/openstack/latest/meta_data.json", "/openstack/2018-08-27/network_data.json", "/computeMetadata/v1/"),
    *(f"{V1}/instance/zone", f"{V1}/project/project-id", f"{V1}/instance/disks/?recursive=true"),
    *("/metadata/instance/compute/location?api-version=2021-02-01&format=text", "/metadata/instance/network"),
    *("/metadata/scheduledevents?api-version=2020-07-01", "/metadata/versions"),
]


@pytest.mark.parametrize("path", [*SECRETS, *HARMLESS])
def test_no_credentials(path: str) -> None:
    assert judged(FilterRules(sets=("no-credentials",)), f"GET {path}").allowed is (path in HARMLESS)


def test_no_credentials_adds_to_what_the_file_allows() -> None:
    """What the set allows counts only where the file allows nothing."""
    rules = FilterRules(("GET /latest/**", "GET /opc/v2/instance/region"), sets=("no-credentials",))
    assert judged(rules, "GET /opc/v2/instance/region").allowed
    assert not judged(rules, "GET /latest/user-data").allowed
    assert not judged(rules, "GET /openstack").allowed


@pytest.mark.parametrize(
    "path",
    [
        *("/ec2/latest/user-data", "/ec2/2009-04-04/meta-data/iam/security-credentials/x"),
        *("/v2/credentials/x", "/v1/credentials", "/machine/?comp=goalstate", "/openstack/content/0000"),
        *("/EC2/latest/User-Data/", "/latest/dynamic/instance-identity/pkcs7/x"),
        *("/openstack/latest/password/x", "/vmSettings"),
    ],
)
def test_no_credentials_refuses_them_where_the_file_allows_everything(path: str) -> None:
    """Nova answers a path with /ec2 in front as the one without. ECS, EKS and WireServer are addresses of their own."""
    assert not judged(FilterRules(("GET /**",), sets=("no-credentials",)), f"GET {path}").allowed


def test_a_token_of_imdsv2_can_be_had_under_no_credentials() -> None:
    assert judged(FilterRules(sets=("no-credentials",)), "PUT /latest/api/token").allowed


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(BadPolicy, match="'all' is not a set of rules: known are no-credentials"):
        Judge(FilterRules(sets=("all",)))
