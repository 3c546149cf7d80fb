"""Where the numbers and pictures of a run go: `metrics.jsonl`, Aim, or a tracker of your own."""

from .aim import AimTracker as AimTracker
from .jsonl import JsonlTracker as JsonlTracker, read_metrics as read_metrics
from .tracker import Tracker as Tracker, Trackers as Trackers
