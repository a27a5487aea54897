"""Federated methods, each one file that reads like its paper."""

from fedekd.methods.base import Broadcast, Method, StateDict, Update
from fedekd.methods.blueprint import Blueprint, ClientOptions
from fedekd.methods.client import Client
from fedekd.methods.fedekd import FedeKD
from fedekd.methods.local import Local

__all__ = [
    "Blueprint",
    "Broadcast",
    "Client",
    "ClientOptions",
    "FedeKD",
    "Local",
    "Method",
    "StateDict",
    "Update",
]
