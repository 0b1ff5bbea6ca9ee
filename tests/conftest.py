"""Small inputs shared by the tests."""

from __future__ import annotations

import pytest

from planner.engine import Engine, engine
from planner.hardware import Cluster, parse_cluster
from planner.model import ModelConfig, load


@pytest.fixture(scope="session")
def mixtral() -> ModelConfig:
    return load("mistralai/Mixtral-8x7B-v0.1")


@pytest.fixture(scope="session")
def deepseek() -> ModelConfig:
    return load("deepseek-ai/DeepSeek-V3")


@pytest.fixture(scope="session")
def h200() -> Cluster:
    return parse_cluster("h200-sxm:2x8")


@pytest.fixture(scope="session")
def vllm() -> Engine:
    return engine("vllm")
