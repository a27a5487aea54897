"""Scores of a trained network with exits, computed once and cached."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from experiments.hospital_runs import fit
from fedekd.atomic import atomic_file
from fedekd.configuration.load_run import open_finished
from fedekd.data import take_inputs
from fedekd.data.corruptions import corrupt
from fedekd.early_exit import ExitPolicy
from fedekd.early_exit.client_calibration import exit_network, image_costs
from fedekd.early_exit.scoring import exit_outputs

#: Options of `fit` for the network; 18,000 images are held out.
OPTIONS = (
    *("--config=early_exit/fashionmnist.yaml", "--data.max_samples=30000", "--data.fractions=[0.4,0.3,0.3]"),
    *("--rounds=2", "--client.local_epochs=2", "--trainer.threads=1", "--logger=null"),
)

#: Share of the images of scanner B, whose noise the network has not seen in training, and its severity.
SHARE_B, NOISE, SEVERITY = 0.2, "gaussian_noise", 3

#: Images per patient: noisy copies of one image, so that their errors depend on each other.
COPIES = 4


class Population(NamedTuple):
    """Scores of n images at E exits; arrays of shape (n, E), or (n,).

    Attributes:
        scores: Largest softmax probability, float64.
        predicted: Predicted class, int64.
        labels: True class, int64.
        scanner: 0 for scanner A, 1 for B.
        patient: Number of the patient.
    """

    scores: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    scanner: npt.NDArray[np.int64]
    patient: npt.NDArray[np.int64]


class Cached(NamedTuple):
    """Populations of a network.

    Attributes:
        images: One image per patient, of scanner A or B.
        patients: `COPIES` noisy copies per patient.
        costs: Cost of a sample at each exit by which of the two early heads are evaluated, shape (2, 2, E).
    """

    images: Population
    patients: Population
    costs: npt.NDArray[np.float64]

    def mean_cost(self, policy: ExitPolicy, exits: npt.NDArray[np.int64]) -> float:
        """Return the mean cost of samples that take the given exits."""
        first, second, _ = (int(is_evaluated) for is_evaluated in policy.evaluated)
        return float(self.costs[first, second][exits].mean())


def cached_scores(folder: Path, root: str, seed: int) -> Cached:
    """Return the scores of the network of a seed; train and score it once.

    Args:
        folder: Folder of the runs and of the cache.
        root: Folder of the data sets.
        seed: Seed of the data, the network and the noise.
    """
    path = folder / f"scores-{seed}.npz"
    if not path.is_file():
        arrays = _scores(folder, root, seed)
        with atomic_file(path) as file:
            np.savez_compressed(file, **arrays)
    with np.load(path) as file:
        parts = {
            name: Population(*(file[f"{name}_{field}"] for field in Population._fields))
            for name in ("images", "patients")
        }
        return Cached(**parts, costs=file["costs"])


def _scores(folder: Path, root: str, seed: int) -> dict[str, npt.NDArray[np.generic]]:
    run = folder / f"network-{seed}"
    fit(run, [*OPTIONS, f"--data.root={root}", f"--seed={seed}", f"--baseline_dir={folder / 'local'}"])
    orchestrator, _, _ = open_finished("fit", run, in_process=True)
    [client] = orchestrator.load_clients()
    network, splits = exit_network(client), client.splits
    indices = torch.cat([splits.validation, splits.test])
    images, labels = take_inputs(client.samples.inputs, indices), client.samples.labels[indices]
    assert isinstance(images, torch.Tensor)
    is_b = np.random.default_rng(seed).uniform(size=len(images)) < SHARE_B
    noisy = torch.where(torch.from_numpy(is_b)[:, None, None, None], corrupt(images, NOISE, SEVERITY, seed), images)
    few, of_few = images[::COPIES], labels[::COPIES]
    copies = torch.cat([corrupt(few, NOISE, 1, 1 + copy) for copy in range(COPIES)])
    parts = {
        "images": (noisy, labels, is_b, np.arange(len(labels))),
        "patients": (copies, of_few.repeat(COPIES), np.zeros(len(copies)), np.tile(np.arange(len(few)), COPIES)),
    }
    costs = image_costs(network, client.samples)
    heads = (False, True)
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "costs": np.asarray([[costs.shares([first, second, True]) for second in heads] for first in heads])
    }
    for name, (pixels, classes, scanner, patient) in parts.items():
        outputs = exit_outputs(network, pixels, classes)
        values = (outputs.to_scores().scores, outputs.logits.argmax(dim=2).numpy(), classes.numpy(), scanner, patient)
        arrays |= {
            f"{name}_{field}": np.asarray(value) for field, value in zip(Population._fields, values, strict=True)
        }
    return arrays
