"""Tables of guarantees per group, and of patients as units."""

from __future__ import annotations

from experiments.result_pages.common import markdown, read

GROUPINGS = {
    "true_class": "true class",
    "predicted_class": "predicted class",
    "scanner": "scanner",
    "patient": "patient",
}
CALIBRATIONS = {
    "none": "no groups",
    "groups": "threshold per group",
    "shared": "shared thresholds",
    "images": "all images of a patient",
    "one image": "one image per patient",
}


def group_coverage() -> str:
    """Draws in which the error rate of some group exceeds the target risk."""
    frame = read("guarantees/groups.csv")
    keys = ["groups", "calibration", "target_risk"]
    rows = []
    for (by, calibration, risk), group in sorted(
        frame.groupby(keys), key=lambda item: (list(GROUPINGS).index(item[0][0]), *_place(item[0]))
    ):
        row = group[group["group"] == "any"].iloc[0]
        worst = group[group["group"] != "any"].sort_values("rate", kind="stable").iloc[-1]
        rows.append(
            [
                GROUPINGS[by],
                CALIBRATIONS[calibration],
                f"{risk:g}",
                "yes" if row["guarantee"] else "no",
                f"{row['rate']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
                f"{worst['group']}, {worst['rate']:.3f}" if worst["violations"] and by != "patient" else "",
                f"{row['open']:.2f}",
                f"{row['saved']:.1%}",
            ]
        )
    heads = ["groups", "calibration", "target risk", "guarantee", "violated in some group", "worst group"]
    return markdown([*heads, "draws with an open exit", "FLOPs saved"], rows)


def _place(key: tuple[str, str, float]) -> tuple[int, float]:
    return list(CALIBRATIONS).index(key[1]), key[2]


def single_groups(by: str, risk: float) -> str:
    """Draws in which each single group exceeds the target risk, per calibration."""
    frame = read("guarantees/groups.csv")
    frame = frame[(frame["groups"] == by) & (frame["target_risk"] == risk) & (frame["group"] != "any")]
    calibrations = [name for name in CALIBRATIONS if name in set(frame["calibration"])]
    rows = []
    for name, group in frame.groupby("group", sort=False):
        cells = group.set_index("calibration").loc[calibrations]
        rows.append(
            [
                str(name),
                *(f"{row['rate']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for _, row in cells.iterrows()),
            ]
        )
    return markdown([GROUPINGS[by], *(CALIBRATIONS[name] for name in calibrations)], rows)


def patient_power() -> str:
    """Power of three tests of the error rate of patients."""
    names = ["one_image", "mean_bets", "mean_bentkus"]
    rows = [
        [
            str(int(row["patients"])),
            str(int(row["images"])),
            f"{row['correlation']:g}",
            *(f"{row[n]:.2f}" for n in names),
        ]
        for _, row in read("guarantees/patients.csv").iterrows()
    ]
    heads = ["patients", "images of each", "correlation of errors", "one image, binomial", "mean, bets"]
    return markdown([*heads, "mean, Bentkus"], rows)
