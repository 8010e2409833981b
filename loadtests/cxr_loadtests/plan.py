"""Everything that a process which sends requests has to know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.images import Sample
from cxr_loadtests.profile import Profile, Scenario
from cxr_loadtests.reference import Reference
from cxr_loadtests.scenarios import Expectations, Expected, Request, requests_of
from cxr_loadtests.target import Target


@dataclass(frozen=True)
class Plan:
    """What is asked, and what must come back.

    Attributes:
        scenarios: those that are asked.
        dispatchers: processes among which the rate of the open model is divided.
    """

    target: Target
    profile: Profile
    samples: Sequence[Sample]
    expectations: Expectations
    scenarios: Sequence[Scenario]
    dispatchers: int = 1

    def requests(self) -> list[Request]:
        """Every request of every scenario."""
        model, grpc = self.target.model, self.target.grpc is not None
        return [
            request
            for scenario in self.scenarios
            for request in requests_of(scenario, self.samples, model, grpc=grpc)
        ]

    def to_document(self) -> dict[str, Any]:
        """Plain data, for another process."""
        return {
            "target": self.target.to_document(),
            "profile": self.profile.model_dump(mode="json"),
            "samples": [[sample.kind, sample.format, sample.data] for sample in self.samples],
            "expectations": {
                version: [[item.label, dict(item.probabilities)] for item in items]
                for version, items in self.expectations.items()
            },
            "scenarios": list(self.scenarios),
            "dispatchers": self.dispatchers,
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        """Read what `to_document` wrote."""
        return cls(
            target=Target.from_document(document["target"]),
            profile=Profile.model_validate(document["profile"]),
            samples=[Sample(*item) for item in document["samples"]],
            expectations={
                version: [Expected(*item) for item in items]
                for version, items in document["expectations"].items()
            },
            scenarios=document["scenarios"],
            dispatchers=document["dispatchers"],
        )


def choose_scenarios(
    profile: Profile, wanted: Sequence[str], target: Target, reference: Reference
) -> tuple[list[Scenario], list[str]]:
    """The scenarios of a run, and sentences about those that are left out.

    Args:
        profile: it has the scenarios by default.
        wanted: names; empty for all of the profile.
        target: without a gRPC endpoint, there is no scenario for it.
        reference: whether the model can explain.

    Raises:
        LoadTestError: a wanted scenario is not in the profile or cannot be asked.
    """
    unknown = [name for name in wanted if name not in profile.scenarios]
    if unknown:
        raise LoadTestError(
            f"The profile has no scenario {unknown[0]}; it has {', '.join(profile.scenarios)}."
        )
    reasons: dict[str, str] = {}
    if target.grpc is None:
        reasons["grpc"] = "grpc is left out: no gRPC endpoint is named (--grpc)."
    if not reference.explains:
        reasons["explain"] = "explain is left out: the model has no explanations."
    for name in wanted:
        if name in reasons:
            raise LoadTestError(reasons[name])
    chosen = [
        name for name in profile.scenarios if name not in reasons and (not wanted or name in wanted)
    ]
    if not chosen:
        raise LoadTestError("No scenario is left.")
    return chosen, [reasons[name] for name in profile.scenarios if name in reasons and not wanted]
