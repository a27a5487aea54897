"""Federated methods, one file per paper."""

from fedekd.methods.base import Broadcast, ClientUpdate, Method, ProxyMethod, StateDict
from fedekd.methods.cafedistill import CAFEDistill
from fedekd.methods.client import Client
from fedekd.methods.depthfl import DepthFL
from fedekd.methods.ditto import Ditto
from fedekd.methods.fedavg import FedAvg
from fedekd.methods.feddyn import FedDyn
from fedekd.methods.fedekd import FedeKD
from fedekd.methods.fedper import FedPer
from fedekd.methods.fedprox import FedProx
from fedekd.methods.fedrep import FedRep
from fedekd.methods.fedtype import FedType
from fedekd.methods.fml import FML, FedKD
from fedekd.methods.local import Local
from fedekd.methods.options import ClientOptions
from fedekd.methods.proxy_ensemble import ProxyEnsemble
from fedekd.methods.safekd import SafeKD
from fedekd.methods.scalefl import ScaleFL
from fedekd.methods.specification import FederationSpec

__all__ = [
    "FML",
    "Broadcast",
    "CAFEDistill",
    "Client",
    "ClientOptions",
    "ClientUpdate",
    "DepthFL",
    "Ditto",
    "FedAvg",
    "FedDyn",
    "FedKD",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedType",
    "FedeKD",
    "FederationSpec",
    "Local",
    "Method",
    "ProxyEnsemble",
    "ProxyMethod",
    "SafeKD",
    "ScaleFL",
    "StateDict",
]
