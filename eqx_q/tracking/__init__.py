"""Logs metrics and pictures of a run: to `metrics.jsonl`, Aim, TensorBoard, W&B and others."""

from .jsonl import JsonlTracker as JsonlTracker, read_metrics as read_metrics
from .remote import (
    BACKENDS as BACKENDS,
    AimTracker as AimTracker,
    MlflowTracker as MlflowTracker,
    RemoteTracker as RemoteTracker,
    TensorBoardTracker as TensorBoardTracker,
    TrackioTracker as TrackioTracker,
    WandbTracker as WandbTracker,
    installed as installed,
)
from .series import series as series
from .tracker import Tracker as Tracker, Trackers as Trackers
