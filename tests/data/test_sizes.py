"""What a dataset takes in memory is known before it is read, about, in every format."""

import gzip
import pickle
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from support.datasets import write_flat
from support.examples import make_episodes, write_episodes

from dt_ray.config.schema import DataConfig
from dt_ray.data.logs.files import find_files
from dt_ray.data.logs.sizes import decoded_size

DATA = make_episodes([200] * 20)
EXACT = DATA.num_transitions * 5 * 4


def size_of(path: Path) -> float:
    config = DataConfig(path=str(path))
    return decoded_size(find_files(config.path), config) / EXACT


def arrays() -> dict[str, np.ndarray]:
    return {
        "observations": DATA.observations,
        "actions": DATA.actions,
        "rewards": DATA.rewards,
        "terminals": DATA.truncated,
    }


def test_parquet_is_counted_by_its_rows(tmp_path: Path) -> None:
    assert size_of(write_episodes(DATA, tmp_path / "episodes.parquet")) == 1
    assert size_of(Path(write_flat(DATA, tmp_path / "flat", num_files=3).path)) == 1


def test_of_many_files_some_are_looked_at(tmp_path: Path) -> None:
    for i in range(100):
        write_episodes(make_episodes([20] * 20), tmp_path / f"{i:03d}.parquet")
    assert size_of(tmp_path) == pytest.approx(100 * 400 * 5 * 4 / EXACT, rel=0.1)


@pytest.mark.parametrize("name", ["log.npz", "log.hdf5", "log.csv", "log.csv.gz", "log.pkl"])
def test_other_formats_are_measured(name: str, tmp_path: Path) -> None:
    """Within a factor of two or so: columns that are not trained on count too."""
    path = tmp_path / name
    match path.suffixes:
        case [".npz"]:
            np.savez_compressed(path, **arrays())
        case [".hdf5"]:
            with h5py.File(path, "w") as file:
                for column, values in arrays().items():
                    file.create_dataset(column, data=values, compression="gzip")
        case [".pkl"]:
            path.write_bytes(pickle.dumps(arrays()))
        case _:
            rows = pq.read_table(write_flat(DATA, tmp_path / "flat", num_files=1).path)
            vectors = {f"obs_{i}": DATA.observations[:, i] for i in range(3)} | {"act_0": DATA.actions[:, 0]}
            pyarrow.csv.write_csv(pa.table({"episode_id": rows["episode_id"], **vectors, "reward": DATA.rewards}), path)
            if path.suffix == ".gz":
                path.write_bytes(gzip.compress(path.read_bytes()))
    assert 0.8 < size_of(path) < 2.5
