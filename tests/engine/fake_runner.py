"""A runner of the fake device, which fails when it is told to."""

from jaxserve.scheduler import Scheduler
from jaxserve.step_plan import StepPlan
from jaxserve.step_result import StepResult
from tests.engine.fake_device import Device
from tests.engine.invariants import private_pages


class Fault(Exception):
    """What a device may do at any time."""


class FakeRunner:
    """Fails once where `fault` says: "before" a step has run, "after" it, or when it is "read"."""

    def __init__(self, device: Device, scheduler: Scheduler):
        self.device, self.scheduler = device, scheduler
        self.fault: str | None = None
        self.is_state_lost = False

    def dispatch(self, plan: StepPlan) -> StepResult:
        assert not self.is_state_lost, "a failed step has taken it"
        self.fail_at("before")
        before = dict(self.device.slots)
        result = self.device.dispatch(plan, self.scheduler.running)
        self.check_written({page for (page, _), _ in before.items() ^ self.device.slots.items()})
        self.fail_at("after")
        return result

    def read(self, result: StepResult) -> StepResult:
        self.fail_at("read")
        return result

    def change_weights(self) -> None:
        self.device.version += 1

    def reset(self) -> None:
        self.is_state_lost = False
        self.device.reset()

    def fail_at(self, place: str) -> None:
        if self.fault == place:
            self.fault, self.is_state_lost = None, True
            raise Fault

    def check_written(self, pages: set[int]) -> None:
        """Nobody else's page, no free one, and none that others may be reading."""
        assert pages <= set(private_pages(self.scheduler)), "not theirs to write"
