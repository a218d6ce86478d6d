"""The page of an evaluation."""

from c2r.reporting.sample_videos import MAX_VIDEO_BYTES
from c2r.scoring.measuring import Scores
from c2r.scoring.page import evaluation_page
from c2r.scoring.results import Evaluation
from c2r.scoring.scenes import ClipFormat


def test_one_large_video_does_not_displace_the_small_ones(tmp_path):
    videos = {name: tmp_path / f"{name}.mp4" for name in ("first", "large", "last")}
    for path in videos.values():
        path.write_bytes(b"video")
    with open(videos["large"], "r+b") as file:
        file.truncate(MAX_VIDEO_BYTES)  # as much as the page may hold in all
    scores = Scores([*videos], values={"ours": {}})
    page = evaluation_page(
        Evaluation(ClipFormat(5, 32, 48, 8.0), 1, scores), b"", videos, ["ours"], dict.fromkeys(videos, "rain")
    )
    assert page.count("<video") == 2
    assert "<h3>last</h3>" in page
    assert "1 more would make the page larger" in page
