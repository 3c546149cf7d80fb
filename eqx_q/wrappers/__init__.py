"""Environments behind one contract: suites, Python environments, emulators, and bridges back."""

from .bridges import to_gymnasium as to_gymnasium, to_pettingzoo as to_pettingzoo
from .custom import register as register
from .env import Env as Env, Recording as Recording
from .exact import Exact as Exact
from .per_device import PerDevice as PerDevice, make_for as make_for
from .registry import env_ids as env_ids, make as make
