"""tests/scale.py at small size: a start reads headers alone, a worker's memory stays."""
import scale


def test_a_start_and_an_epoch_at_small_size(tmp_path):
    scale.write_rows(tmp_path / "rows", 6000, 3)
    found = scale.start(tmp_path / "rows", 0)
    assert 0 < found["seconds"] < 5 and found["mb"] < 300
    epoch = scale.epoch(tmp_path / "rows", 5000)
    assert len(epoch["mb"]) == 5 and max(epoch["mb"]) < min(epoch["mb"]) + 20
    assert epoch["samples_per_second"] > 100


def test_sixteen_million_rows_cost_a_start_no_list_of_rows(tmp_path, monkeypatch):
    """What a start keeps does not grow with the rows of a shard: 16 M rows are 1,600 headers."""
    import tracemalloc
    sizes = []
    for rows in (3000, 12000):
        scale.write_rows(tmp_path / str(rows), rows, 3)
        scale.open_batches(tmp_path / str(rows), 0, 1, "--val", "8")         # imports, caches
        tracemalloc.start()
        kept = scale.open_batches(tmp_path / str(rows), 0, 1, "--val", "8")
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del kept
    assert sizes[1] < 1.2 * sizes[0] + 50_000, sizes
