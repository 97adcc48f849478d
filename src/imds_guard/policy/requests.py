# SPDX-License-Identifier: Apache-2.0
"""The specification of a filter: ``Judge`` says whether a request is passed on, and which rule refuses it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.policy.filters import FilterRules
from imds_guard.policy.header_rules import IMDSV2_TOKEN, Headers, check_ec2_metadata_filter, values_of
from imds_guard.policy.path_pattern import METHODS, PathPattern, parse_pattern
from imds_guard.policy.request_target import RequestTarget
from imds_guard.policy.rule_sets import expand

FORBIDDEN = 403
MALFORMED = 400


class Request(NamedTuple):
    """A well-formed request."""

    method: str
    target: RequestTarget
    headers: Headers = ()


class Outcome(NamedTuple):
    """``status`` 0 passes the request on; 403 and 400 refuse it by ``rule``, which is as the file has it."""

    status: int
    rule: str = ""

    @property
    def allowed(self) -> bool:
        """True when the rules pass the request on."""
        return self.status == 0


PASS = Outcome(0)


class Judge:
    """The rules of one filter. Raises BadPolicy where a pattern is none."""

    def __init__(self, rules: FilterRules) -> None:
        expanded = expand(rules)
        self._allow = tuple(parse_pattern(text) for text in expanded.allow)
        self._deny = tuple(parse_pattern(text, ignore_case=True) for text in expanded.deny)
        self._rules = rules

    def judge(self, request: Request) -> Outcome:
        """Checked in this order: headers, IMDSv2, deny, allow. The first that refuses gives the rule."""
        rules = self._rules
        if rules.headers is not None:
            refusal = check_ec2_metadata_filter(request.headers, rules.user_agents)
            if refusal is not None:
                return Outcome(MALFORMED, f"headers: {refusal.rule}")
        if rules.require_imdsv2 and not _has_session(request):
            return Outcome(FORBIDDEN, "require_imdsv2")
        denied = self._denied(request)
        if denied is not None:
            return Outcome(FORBIDDEN, f"deny: {denied.text}")
        return PASS if self._is_allowed(request) else Outcome(FORBIDDEN, "no allow rule")

    def _denied(self, request: Request) -> PathPattern | None:
        """The rule that denies the request. It need not mean the path itself where the answer contains more."""
        is_wide = is_widened(request.target) or answers_with_subtree(request.target)
        for pattern in self._deny:
            if pattern.is_for(request.method):
                path = request.target.segments
                if pattern.touches(path) if is_wide else pattern.matches(path):
                    return pattern
        return None

    def _is_allowed(self, request: Request) -> bool:
        if request.method not in METHODS:
            return False
        is_wide = is_widened(request.target)
        for pattern in self._allow:
            # Without a method, an allow rule is about reading.
            if pattern.is_for(request.method) if pattern.method else request.method in ("GET", "HEAD"):
                path = request.target.segments
                if pattern.covers(path) if is_wide else pattern.matches(path):
                    return True
        return False


_WIDENS = "recursive"
_OF_FOLDERS = ("alt", "last_etag", "wait_for_change")


def is_widened(target: RequestTarget) -> bool:
    """True when the query may make the answer contain what is below the path: it is judged as the whole subtree.

    Google Cloud: ``recursive=true``. ``alt``, ``last_etag`` and ``wait_for_change`` are about a folder's content where
    the path ends with a slash; at a value they change the form of the answer, or when it comes.
    Source: https://cloud.google.com/compute/docs/metadata/querying-metadata.
    """
    names = {name for name, _ in target.parameters}
    return _WIDENS in names or (target.is_folder and not names.isdisjoint(_OF_FOLDERS))


def may_wait(target: RequestTarget) -> bool:
    """True when the service may answer much later: Google Cloud's ``wait_for_change``."""
    return any(name == "wait_for_change" for name, _ in target.parameters)


def answers_with_subtree(target: RequestTarget) -> bool:
    """True for services that answer a path with all that is below it, whatever the query.

    Azure's /metadata/instance, source: https://learn.microsoft.com/en-us/azure/virtual-machines/instance-metadata-service.
    Oracle's /opc, source: https://docs.oracle.com/en-us/iaas/Content/Compute/Tasks/gettingmetadata.htm.
    """
    begin = tuple(segment.lower() for segment in target.segments[:2])
    return begin == ("metadata", "instance") or begin[:1] == ("opc",)


def _has_session(request: Request) -> bool:
    """True for a request of IMDSv2: it carries a token, or asks for one."""
    path = request.target.segments
    if request.method == "PUT" and len(path) == 3 and path[1:] == ("api", "token"):
        return True
    tokens = values_of(request.headers, IMDSV2_TOKEN)
    return len(tokens) == 1 and bool(tokens[0])
