from .env import Env as Env
from .registry import env_ids as env_ids, make as make
