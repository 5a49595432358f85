"""Any history of requests on the scheduler and a device that keeps books."""

from tests.engine.scheduler_machine import HISTORIES, SchedulerMachine

TestAnyHistory = SchedulerMachine.TestCase
TestAnyHistory.settings = HISTORIES
