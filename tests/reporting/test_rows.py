"""Order of columns, series of clients, and the direction of harm."""

from __future__ import annotations

from fedekd.reporting.rows import client_prefix, client_series, column_order, is_harm


def test_column_order_starts_with_round_and_sorts_clients_by_number():
    names = [
        "client_2/b",
        "client_10/a",
        "zeta",
        "client_2/a",
        "alpha/10",
        "alpha/9",
        "round",
        "client_1/loss/kd",
    ]
    expected = [
        "round",
        "alpha/9",
        "alpha/10",
        "zeta",
        "client_1/loss/kd",
        "client_2/a",
        "client_2/b",
        "client_10/a",
    ]
    assert column_order(names) == column_order(reversed(names)) == expected


def test_client_series_matches_whole_names_and_keeps_gaps():
    history = [
        {
            "round": 1,
            "client_2/gate/weight_mean": 0.1,
            "gate/weight_mean": 9.0,
            "client_2/gate/weight_mean_max": 9.0,
        },
        {"round": 2, "client_10/gate/weight_mean": 0.2},
        {"round": 3, "client_2/gate/weight_mean": 0.3},
    ]
    assert client_series(history, "gate/weight_mean") == {"2": ([1, 3], [0.1, 0.3]), "10": ([2], [0.2])}


def test_client_names_of_sites_sort_by_number_of_the_client():
    clients = ["Zürich (CH) no. 1", "3", "Long Beach"]
    columns = [f"{client_prefix(number, name)}delta" for number, name in enumerate(clients)]
    assert columns[0] == "client_Zürich (CH) no. 1/delta"
    assert column_order(["delta/avg", *reversed(columns)], clients) == ["delta/avg", *columns]
    history = [{"round": 1, columns[2]: 0.1}, {"round": 2, columns[2]: 0.2, columns[0]: 0.3}]
    series = client_series(history, "delta", clients)
    assert list(series.items()) == [("Zürich (CH) no. 1", ([2], [0.3])), ("Long Beach", ([1, 2], [0.1, 0.2]))]


def test_is_harm_depends_on_the_direction_of_the_metric():
    assert [is_harm(delta, "accuracy") for delta in (-0.1, 0.0, 0.1)] == [True, False, False]
    assert [is_harm(delta, "rmse") for delta in (-0.1, 0.0, 0.1)] == [False, False, True]
