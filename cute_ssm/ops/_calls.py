"""`CallPath`: from the arguments of a call to a launch; the one way that all operators run.

A call that has been made before finds its plan by a key and launches; everything else is checked first, and then runs
on the GPU, in the emulator that is open, or by the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from cute_ssm import arch as archs
from cute_ssm import runtime, tuning
from cute_ssm.arch import Arch
from cute_ssm.ops._plans import REFUSALS, Plans
from cute_ssm.spec import Config, Spec
from cute_ssm.tuning import overridden


class Plan(NamedTuple):
    """A kernel that is ready to launch, and what it takes behind the operands of a call."""

    launch: Callable[..., None]
    scalars: tuple[Any, ...] = ()


def _plain(kernel: Callable[..., None], config: Config, sm_count: int) -> Plan:
    return Plan(kernel)


class Checked(NamedTuple):
    """A call that has passed the checks of its arguments, and how it runs.

    Attributes
    ----------
    spec : Spec
        What the kernel is specialised on.
    operands : tuple
        What the kernel takes: its tensors, then the numbers of this call.  The first is a tensor.
    units : int
        Amount of work; 0: nothing is launched.
    choose : callable
        Of a target and a number of SMs, the config.
    check_contents : callable
        Raises on values of CPU tensors, such as indices, that do not fit.
    reference : callable
        Does what the kernel does, in PyTorch, after `check_contents`.
    bind : callable
        Of a kernel, its config and a number of SMs, the plan.
    strict : bool
        Whether the kernel's entry refuses arguments of any other layout, so that the plan holds by key alone.
    """

    spec: Spec
    operands: tuple[Any, ...]
    units: int
    choose: Callable[[Arch, int], Config]
    check_contents: Callable[[], None]
    reference: Callable[[], object]
    bind: Callable[[Callable[..., None], Any, int], Plan] = _plain
    strict: bool = True


class CallPath:
    """How an operator runs its calls.

    A kernel for aligned arguments refuses others, and its plan is tried first.  A kernel for arguments at any address
    would take aligned ones too, slowly, so its plan is kept with the layout of the arguments.

    Parameters
    ----------
    layout : callable, optional
        Of the operands, what alignment depends on.  Needed where calls are not `strict`.  It may raise AttributeError
        for an operand that is no tensor.
    """

    def __init__(self, layout: Callable[[tuple[Any, ...]], Hashable] | None = None):
        self.layout = layout
        self.plans: Plans[Any] = Plans()
        self.loose_plans: Plans[Any] = Plans()

    def run_plan(self, key: Hashable, operands: tuple[Any, ...]) -> bool:
        """Launch as an earlier call with this key did.

        Returns
        -------
        bool
            False if there was none, or the kernel's entry refused the operands, before anything was launched: strides
            or alignment are others, or an argument is bad, which the checks will tell.
        """
        plan = self.plans.get(key)
        if plan is not None and not (tuning.overrides_open and overridden()):
            launch, scalars = plan
            try:
                launch(*(operands + scalars))
                return True
            except REFUSALS:
                pass
        if not self.loose_plans or key is None or self.layout is None:
            return False
        try:
            plan = self.loose_plans.get((key, self.layout(operands)))
        except AttributeError:  # an operand is no tensor, which the checks name
            return False
        if plan is None or overridden():
            return False
        launch, scalars = plan
        try:
            launch(*operands, *scalars)
        except REFUSALS:
            return False
        return True

    def run(self, key: Hashable, call: Checked) -> None:
        """Run a checked call, and remember its plan once it has been launched on a GPU.

        A kernel's first launch loads its library, under a lock of the compiler's runtime that spins, for whichever
        kernel.  So threads take turns here, and no plan is known to others before that.

        Parameters
        ----------
        key : hashable or None
            All that the choice of kernel and config depends on, and what the kernel's entry does not check before it
            launches.  None: the call cannot be remembered.
        call : Checked
        """
        device = call.operands[0].device
        if not call.operands[0].is_cuda:
            with torch.no_grad():
                self._run_on_cpu(call)
        elif call.units:
            arch = runtime.target(device)
            sm_count = torch.cuda.get_device_properties(device).multi_processor_count
            config = call.choose(arch, sm_count)
            plan = call.bind(runtime.get(call.spec, config, arch), config, sm_count)
            with runtime.LOADING:
                plan.launch(*call.operands, *plan.scalars)
            self.remember(key, call, plan)

    def remember(self, key: Hashable, call: Checked, plan: Plan) -> None:
        """Keep the plan of a call, with the layout of its operands unless the kernel refuses all others."""
        if call.strict:
            self.plans.remember(key, plan)
        elif key is not None and self.layout is not None:
            self.loose_plans.remember((key, self.layout(call.operands)), plan)

    def _run_on_cpu(self, call: Checked) -> None:
        """Run the compiled kernel if an emulator is open, else the reference."""
        call.check_contents()
        emulator = runtime.emulator()
        if emulator is None:
            runtime.by_reference(call.spec, call.operands)
            call.reference()
        elif call.units:
            arch = archs.by_name(emulator.arch)
            sm_count = emulator.sm_count or arch.sm_count
            config = call.choose(arch, sm_count)
            plan = call.bind(runtime.emulated(call.spec, config, arch), config, sm_count)
            plan.launch(*call.operands, *plan.scalars)
