import hlo
import jax
import jax.numpy as jnp
import pytest

# As XLA prints it: a loop over updates of unknown length, which acts (4 trips) and learns (2).
# ruff: noqa: E501
PROGRAM = """
HloModule jit_train, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%p, %p)
}

%acting (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%a), index=1
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(train)/act"}
  %z = f32[8]{0} copy(%y), metadata={op_name="jit(train)/act"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %z)
}

%learning (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]{0}) parameter(0)
  %g = (f32[8]{0}, s8[64]{0}) custom-call(%b), custom_call_target="__cublas$gemm", metadata={op_name="jit(train)/transpose(jvp())/dot_general"}
  %c = f32[8]{0} conditional(%i, %g, %g), branch_computations={%one, %other}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %c)
}

%one (o: f32[8]) -> f32[8] {
  ROOT %w = f32[8]{0} fusion(%o), kind=kLoop, calls=%fused, metadata={op_name="jit(train)/one"}
}

%other (o: f32[8]) -> f32[8] {
  ROOT %w = f32[8]{0} fusion(%o), kind=kLoop, calls=%fused, metadata={op_name="jit(train)/other"}
}

%short (c: (s32[], f32[8])) -> pred[] {
  ROOT %l = pred[] fusion(%i), kind=kLoop, calls=%fused, metadata={op_name="jit(train)/while/cond"}
}

%update (u: (s32[], f32[8])) -> (s32[], f32[8]) {
  %u = (s32[], f32[8]{0}) parameter(0)
  %w = (s32[], f32[8]{0}) while(%u), condition=%short, body=%acting, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %v = (s32[], /*index=1*/f32[8]{0}) while(%w), condition=%short, body=%learning, backend_config={"known_trip_count":{"n":"2"}}
}

ENTRY %main (m: (s32[], f32[8])) -> (s32[], f32[8]) {
  %m = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%m), condition=%short, body=%update
}
"""


def test_launches_are_counted_loop_by_loop():
    (update,) = hlo.read(PROGRAM).loops
    assert update.trips is None
    counted = hlo.counts(update, rollout_length=4, num_minibatches=2)
    # Acting: a fusion and a copy. Learning: a call and two branches. Updates: the condition too,
    # since their number is not known when compiling.
    assert (counted["env_step"], counted["gradient_step"]) == (2, 3)
    assert counted["update"] == 4 * 2 + 2 * 3 + 1
    assert counted["kernels"]["gradient_step"] == {
        "__cublas$gemm: jit(train)/transpose(jvp())/dot_general": 1,
        "fusion: jit(train)/one": 1,
        "fusion: jit(train)/other": 1,
    }


def test_a_program_without_an_environment_has_no_environment_step():
    (update,) = hlo.read(PROGRAM).loops
    counted = hlo.counts(update, rollout_length=5, num_minibatches=1)
    assert counted["update"] == 15 and not {"env_step", "gradient_step"} & counted.keys()
    assert counted["kernels"]["update"]["fusion: jit(train)/act"] == 4


def test_loops_of_a_compiled_program_are_found():
    def inner(x, _):
        return jnp.sin(x) @ x, None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, jnp.cos(x), length=3)
        return x, None

    x = jnp.ones((64, 64))
    compiled = jax.jit(lambda x: jax.lax.scan(outer, x, length=7)[0]).lower(x).compile()
    loops = {loop.trips: loop for loop in hlo.read(compiled.as_text()).everywhere()}
    assert {1, 7, 3} <= set(loops)
    assert loops[7].total > 3 * loops[3].total > 0


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("HloModule nothing")
