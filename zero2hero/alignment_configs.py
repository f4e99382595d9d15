"""What alignment can be told: reward models, preferences, reinforcement learning. Like config.py, without torch."""

from __future__ import annotations
