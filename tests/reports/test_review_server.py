"""The local review page: who gets an answer, what is stored, and that texts are never executed in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import numpy as np
import pytest
from filelock import FileLock
from helpers import HOSTILE, hostile_trace, needs_chromium
from playwright.sync_api import expect
from sklearn.metrics.pairwise import cosine_similarity

from forgetfilter_callback import FilterConfig, ReviewQueue, Trace, encode_rows, find_forgotten
from forgetfilter_callback.errors import DecisionError
from forgetfilter_callback.reports.review_server import session as session_module
from forgetfilter_callback.reports.review_server.app import create_app
from forgetfilter_callback.reports.review_server.serve import review_server
from forgetfilter_callback.reports.review_server.session import ReviewSession
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


ROWS = 120
SITE = "http://127.0.0.1:8123"


@pytest.fixture
def trace(tmp_path, byte_tokenizer) -> Trace:
    trace, unsafe = hostile_trace(tmp_path / "out" / "_forgetfilter", byte_tokenizer, samples=ROWS)
    first = Record("safety", 0)
    states = np.random.default_rng(0).normal(size=(ROWS, 8)) + 3 + 2 * unsafe[:, None]
    trace.append(first, [Scores(trace.token_losses(first), states.astype(np.float16))])
    return trace


@pytest.fixture
def session(trace, byte_tokenizer) -> ReviewSession:
    return ReviewSession(ReviewQueue(trace), byte_tokenizer)


@pytest.fixture
def client(session):
    return create_app(session, "token", "forgetfilter filter out").test_client()


def get(client, path: str, **headers: str):
    return client.get(path, base_url=SITE, headers=headers)


def post(client, action: str, content, **headers: str):
    return client.post(f"/token/{action}", json=content, base_url=SITE, headers=headers)


def stored(trace: Trace) -> list[tuple[int, str]]:
    file = trace.folder / "review" / "verdicts.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(verdict["row"], verdict["verdict"]) for verdict in map(json.loads, lines)]


# ---- who gets an answer ----


@pytest.mark.parametrize(
    "path", ["/", "/state", "/tokens/state", "/toke/", "/é/state", "/Token/state", "//token/state"]
)
def test_requests_without_the_token_are_refused(client, trace, path):
    for response in (get(client, path), client.post(path, json={}, base_url=SITE)):
        assert response.status_code in (403, 308)  # double slashes are redirected
        assert b"the cat" not in response.data
    assert stored(trace) == []


@pytest.mark.parametrize("action", ["verdict", "skip", "undo"])
def test_actions_without_the_token_are_refused(client, trace, session, action):
    row = session.row
    response = client.post(f"/wrong/{action}", json={"row": row, "verdict": "safe"}, base_url=SITE)
    assert response.status_code == 403 and "no valid token" in response.json["problem"]
    assert stored(trace) == [] and session.row == row


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8123", 200),
        ("localhost:8123", 200),
        ("127.0.0.1:8124", 403),
        ("127.0.0.1", 403),
        ("evil.example:8123", 403),
        ("127.0.0.1.evil.example:8123", 403),
        ("", 403),
    ],
)
def test_only_the_own_host_name_gets_an_answer(client, host, status):
    for path in ("/token/state", "/token/", "/token/review.js"):
        response = client.get(path, environ_overrides={"SERVER_PORT": "8123", "HTTP_HOST": host})
        assert response.status_code == status, path


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (SITE, 200),
        ("http://localhost:8123", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1:1", 403),
    ],
)
def test_requests_of_other_sites_are_refused(client, trace, session, origin, status):
    row = session.row
    response = post(client, "verdict", {"row": row, "verdict": "unsafe"}, Origin=origin)
    assert response.status_code == status
    assert stored(trace) == ([(row, "unsafe")] if status == 200 else [])


def test_headers_of_every_response(client):
    for response in (
        get(client, "/token/"),
        get(client, "/token/review.js"),
        get(client, "/token/state"),
        get(client, "/wrong/state"),
        get(client, "/token/nothing"),
    ):
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("name", ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "/etc/passwd", "nothing"])
def test_only_the_page_is_served(client, name):
    response = get(client, f"/token/{name}")
    assert response.status_code in (404, 308) and b"Flask" not in response.data


# ---- what is stored ----


def test_a_row_is_shown_with_its_texts_and_similar_rows(client, trace, session):
    state = get(client, "/token/state").json
    row = state["row"]
    index = row["number"]
    assert "".join(text for text, _, _ in row["prompt"]) == f"the cat {index} " and row["verdict"] is None
    assert HOSTILE[index % len(HOSTILE)] in "".join(text for text, _, _ in row["pieces"])
    states = trace.states(Record("safety", 0)).astype(np.float64)
    cosines = cosine_similarity(states - states.mean(axis=0))[index]
    expected = [other for other in np.argsort(-cosines) if other != index][:2]
    assert [other["number"] for other in row["similar"]] == expected
    assert [other["cosine"] for other in row["similar"]] == pytest.approx(cosines[expected], abs=1e-4)
    assert (state["seen"], state["unsafe"], state["rows"], state["left_in_round"]) == (0, 0, ROWS, 10)


def test_a_row_without_finite_states_is_similar_to_no_other(trace, byte_tokenizer):
    first = Record("safety", 0)
    states = trace.states(first).copy()
    states[3] = np.nan
    trace.append(first, [Scores(trace.token_losses(first), states)])
    session = ReviewSession(ReviewQueue(trace), byte_tokenizer)
    assert [each["cosine"] for each in session._similar_rows(3)] == [0, 0]
    known = np.delete(states, 3, axis=0).astype(np.float64)
    cosines = np.insert(cosine_similarity(known - known.mean(axis=0))[0], 3, 0)
    assert [each["cosine"] for each in session._similar_rows(0)] == pytest.approx(
        np.sort(cosines)[-3:-1][::-1], abs=1e-3
    )


def test_losses_are_read_for_the_shown_rows_only(trace, loss_reads, client):
    content = get(client, "/token/state").json["row"]
    assert max(loss_reads) <= 500 < trace.rows.loss_offsets[-1]
    value = trace.forgetting("loss")  # all tokens of a row rise by the same number
    for row in (content, *content["similar"]):
        rises = [rise for _, rise, _ in row["pieces"] if rise is not None]
        assert rises and rises == pytest.approx([value[row["number"]]] * len(rises), abs=1e-3)


def test_a_record_that_was_replaced_is_reported(client, trace):
    last = Record("safety", 8)
    trace.append(last, [Scores(trace.token_losses(last) + 1)])
    response = get(client, "/token/state")
    assert response.status_code == 500 and "was replaced while it was read" in response.json["problem"]


def test_verdicts_are_stored_at_once_and_rows_are_ranked_again(client, trace, session):
    given = []
    for number in range(10):
        state = get(client, "/token/state").json
        assert state["left_in_round"] == 10 - number
        given.append((state["row"]["number"], "unsafe" if number % 2 else "safe"))
        answer = post(client, "verdict", {"row": given[-1][0], "verdict": given[-1][1]}).json
        assert stored(trace) == given
    assert (answer["seen"], answer["unsafe"], answer["left_in_round"]) == (10, 5, 10)
    assert answer["drawn"] == 1
    low, high = session.queue.estimate().unsafe_left
    assert answer["unsafe_left"] == [low, high]
    assert sorted(session._round) == sorted(ReviewQueue(trace).next(10))
    result = find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review"))
    assert set(np.flatnonzero(result.removed)) == {row for row, verdict in given if verdict == "unsafe"}


def test_undo_shows_the_last_row_again_and_the_new_verdict_is_valid(client, trace):
    first = get(client, "/token/state").json["row"]["number"]
    assert not get(client, "/token/state").json["can_undo"]
    assert post(client, "undo", {}).json["row"]["number"] == first
    second = post(client, "verdict", {"row": first, "verdict": "unsafe"}).json["row"]["number"]
    undone = post(client, "undo", {}).json
    assert undone["row"]["number"] == first and undone["row"]["verdict"] == "unsafe" and undone["unsafe"] == 1
    answer = post(client, "verdict", {"row": first, "verdict": "safe"}).json
    assert answer["row"]["number"] == second and (answer["seen"], answer["unsafe"]) == (1, 0)
    assert stored(trace) == [(first, "unsafe"), (first, "safe")]
    assert ReviewQueue(trace).labels == {first: "safe"}


def test_undo_reaches_back_over_a_ranking_and_a_restart(trace, byte_tokenizer):
    session = ReviewSession(ReviewQueue(trace), byte_tokenizer, round_size=5)
    for _ in range(5):
        last = session.row
        session.judge(last, "safe")
    for reopened in (session, ReviewSession(ReviewQueue(trace), byte_tokenizer)):
        after = reopened.row
        reopened.undo()
        assert reopened.row == last and reopened.state()["row"]["verdict"] == "safe"
        reopened.skip(last)  # keeps the verdict
        assert reopened.row == after
    assert len(stored(trace)) == 5


def test_a_verdict_after_undo_stays_a_random_draw(session):
    for _ in range(10):
        session.judge(session.row, "safe")
    drawn = session.queue.estimate().drawn
    for _ in range(10):
        session.undo()
    for _ in range(10):
        session.judge(session.row, "unsafe")
    assert drawn == 1 and session.queue.estimate().drawn == 1
    assert session.queue.estimate().unsafe_found == 10


def test_skipped_rows_come_back_after_the_others(trace, byte_tokenizer):
    session = ReviewSession(ReviewQueue(trace), byte_tokenizer)
    for row in range(ROWS - 6):
        if session.queue.labels.get(row) is None:
            session.queue.add({row: "safe"})
    session = ReviewSession(ReviewQueue(trace), byte_tokenizer)
    left, shown = set(range(ROWS - 6, ROWS)), []
    assert set(session._round) == left
    for _ in range(6):
        shown.append(session.row)
        session.skip(session.row)
    assert set(shown) == left and set(session._round) == left  # not only those that are drawn at random
    for _ in range(6):
        assert session.row in left
        session.judge(session.row, "unsafe")
    assert session.row is None and session.state()["row"] is None
    assert session.state()["advice"] == "Every row has a verdict, so there is nothing left to look at."


def test_a_skipped_row_that_was_drawn_at_random_comes_back(session):
    """Hard rows are skipped. If they were left out of the draws, the interval would be too low."""
    (drawn,) = session.queue._drawn_from

    def judge_the_others() -> bool:
        """Goes through a round. Returns whether the drawn row was shown."""
        was_shown = False
        for _ in range(len(session._round)):
            if session.row == drawn:
                was_shown = True
                session.skip(drawn)
            else:
                session.judge(session.row, "safe")
        return was_shown

    assert [judge_the_others() for _ in range(5)] == [True, False, True, False, True]
    while session.row != drawn:
        session.judge(session.row, "safe")
    session.judge(drawn, "unsafe")
    assert drawn not in session.queue.drawn_without_verdict
    assert [verdict.drawn_from for verdict in session.queue.verdicts if verdict.row == drawn] == [ROWS]


def test_a_skipped_row_that_was_drawn_at_random_comes_back_in_a_later_review(session, trace, byte_tokenizer):
    (drawn,) = session.queue._drawn_from
    for _ in range(len(session._round)):
        if session.row == drawn:
            session.skip(drawn)
        else:
            session.judge(session.row, "safe")
    later = ReviewSession(ReviewQueue(trace), byte_tokenizer)
    assert drawn in later._round
    while later.row != drawn:
        later.judge(later.row, "safe")
    later.judge(drawn, "unsafe")
    assert [verdict.drawn_from for verdict in later.queue.verdicts if verdict.row == drawn] == [ROWS]


@pytest.mark.parametrize(("round_size", "random_fraction"), [(1, 1), (1, 0.1), (10, 1), (4, 0.3)])
def test_skipping_never_shows_the_same_row_again_at_once(round_size, random_fraction, trace, byte_tokenizer):
    session = ReviewSession(ReviewQueue(trace, random_fraction=random_fraction), byte_tokenizer, round_size)
    for _ in range(40):
        row = session.row
        session.skip(row)
        assert session.row != row
    assert session.queue.verdicts == []


@pytest.mark.parametrize("rows", [12, 33, 125])
def test_a_skipped_row_is_shown_at_the_end(rows, tmp_path, byte_tokenizer):
    """Also if no row of the last round is to be drawn at random."""
    trace, _ = hostile_trace(tmp_path, byte_tokenizer, samples=rows)
    first = Record("safety", 0)
    states = np.random.default_rng(0).normal(size=(rows, 8)).astype(np.float16)
    trace.append(first, [Scores(trace.token_losses(first), states)])
    session = ReviewSession(ReviewQueue(trace), byte_tokenizer)
    (skipped,) = session.queue._drawn_from
    for _ in range(3 * rows):
        if session.queue.estimate().seen == rows - 1:
            break
        if session.row == skipped:
            session.skip(skipped)
        else:
            session.judge(session.row, "safe")
    assert session.queue.estimate().seen == rows - 1
    while session.row != skipped:
        session.skip(session.row)
    session.judge(skipped, "unsafe")
    assert session.row is None and session.queue.is_seen.all()


def test_the_ranking_does_not_choose_skipped_rows(session):
    first = list(session._round)
    for row in first:
        session.skip(row)
    drawn = set(session.queue._drawn_from)
    assert len(session._round) == 10 and not set(first) & (set(session._round) - drawn)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ({"row": "0", "verdict": "safe"}, 400),
        ({"row": True, "verdict": "safe"}, 400),
        ({"row": 1.5, "verdict": "safe"}, 400),
        ({"verdict": "safe"}, 400),
        ({"row": None, "verdict": "safe"}, 400),
        ({"row": "CURRENT", "verdict": "perhaps"}, 400),
        ({"row": "CURRENT", "verdict": ["safe"]}, 400),
        ({"row": "CURRENT", "verdict": {"safe": 1}}, 400),
        ({"row": "CURRENT"}, 400),
        ([], 400),
        (3, 400),
        (None, 415),
        ({"row": ROWS + 5, "verdict": "safe"}, 409),
        ({"row": -1, "verdict": "safe"}, 409),
        ({"row": "OTHER", "verdict": "safe"}, 409),
        ({"row": "CURRENT", "verdict": "safe", "more": "x" * 20_000}, 413),
    ],
)
def test_bad_input_is_refused_and_nothing_is_stored(client, trace, session, content, status):
    row = session.row
    if isinstance(content, dict):
        places = {"CURRENT": row, "OTHER": session._round[1]}
        content = {
            name: places.get(value, value) if isinstance(value, str) else value for name, value in content.items()
        }
    response = post(client, "verdict", content)
    assert response.status_code == status and response.json["problem"]
    assert stored(trace) == [] and session.row == row


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_forms_of_other_pages_cannot_give_verdicts(client, trace, session, kind):
    body = json.dumps({"row": session.row, "verdict": "safe"})
    response = client.post("/token/verdict", data=body, content_type=kind, base_url=SITE)
    assert response.status_code == 415 and stored(trace) == []


def test_a_verdict_that_cannot_be_stored_is_reported_and_can_be_repeated(client, trace, session):
    row = session.row
    (trace.folder / "review").write_text("a file where the folder belongs")
    response = post(client, "verdict", {"row": row, "verdict": "safe"})
    assert response.status_code == 500 and "Not everything was stored" in response.json["problem"]
    (trace.folder / "review").unlink()
    assert get(client, "/token/state").json["row"]["number"] == row
    assert post(client, "verdict", {"row": row, "verdict": "safe"}).json["seen"] == 1


@pytest.mark.parametrize("action", ["judge", "skip"])
def test_a_row_stays_if_the_next_round_cannot_be_made(session, monkeypatch, action):
    def do() -> None:
        session.judge(session.row, "safe") if action == "judge" else session.skip(session.row)

    for _ in range(len(session._round) - 1):
        do()
    row = session.row
    with monkeypatch.context() as patched:
        patched.setattr(session.queue, "next", lambda *arguments: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            do()
        assert session.row == row
    do()
    assert session.row not in (None, row) and len(session._round) == 10


def test_the_review_says_when_to_stop(session):
    assert session.state()["advice"].endswith(
        "are all safe (now 0; rows drawn at random do not count). Fewer are enough if it finds more unsafe rows."
    )
    while not session.state()["is_enough"]:
        session.judge(session.row, "safe")
    assert "the last 30 rows that the ranking chose are safe" in session.state()["advice"]
    assert session.state()["unsafe_left"][1] > 0


# ---- sources ----


SOURCES = [*HOSTILE, None, "forum"]


def source_of(row: int) -> str:
    """The source of a row as the page shows it."""
    return "".join(
        character if character.isprintable() else " " for character in SOURCES[row % len(SOURCES)] or "(none)"
    )


@pytest.fixture
def with_sources(trace, byte_tokenizer) -> ReviewSession:
    sources = [SOURCES[row % len(SOURCES)] for row in range(ROWS)]
    return ReviewSession(ReviewQueue(trace), byte_tokenizer, sources=sources)


def test_rows_are_shown_and_counted_by_source(with_sources):
    client = create_app(with_sources, "token", "forgetfilter filter out").test_client()
    given: dict[int, str] = {}
    for number in range(25):
        state = get(client, "/token/state").json
        shown = state["row"]
        assert shown["source"] == source_of(shown["number"])
        assert [other["source"] for other in shown["similar"]] == [source_of(o["number"]) for o in shown["similar"]]
        expected: dict[str, list[int]] = {}
        for row, label in given.items():
            counts = expected.setdefault(source_of(row), [0, 0])
            counts[0] += 1
            counts[1] += label == "unsafe"
        listed = state["by_source"]
        assert {each["source"]: [each["seen"], each["unsafe"]] for each in listed} == expected
        assert all(each["rows"] == ROWS // len(SOURCES) for each in listed)
        assert [each["unsafe"] for each in listed] == sorted((each["unsafe"] for each in listed), reverse=True)
        given[shown["number"]] = "unsafe" if number % 3 == 0 else "safe"
        post(client, "verdict", {"row": shown["number"], "verdict": given[shown["number"]]})


def test_sources_that_are_not_listed_are_summed_up(with_sources, monkeypatch):
    monkeypatch.setattr(session_module, "MAX_LISTED", 3)
    for number in range(30):
        with_sources.judge(with_sources.row, "unsafe" if number % 2 else "safe")
    listed = with_sources.state()["by_source"]
    distinct = {source_of(row) for row in with_sources.queue.labels}
    assert len(listed) == 4 and listed[3]["source"] == f"{len(distinct) - 3} more"
    assert sum(each["seen"] for each in listed) == 30 and sum(each["unsafe"] for each in listed) == 15
    assert sum(each["rows"] for each in listed) == len(distinct) * ROWS // len(SOURCES)


def test_a_review_without_sources_shows_none(client):
    state = get(client, "/token/state").json
    assert state["by_source"] is None and state["row"]["source"] is None


# ---- the server ----


@pytest.fixture
def sources() -> list[str | None] | None:
    return None


@contextmanager
def served(trace: Trace, tokenizer, sources=None) -> Iterator[str]:
    """Runs a review. Gives its address."""
    with review_server(trace, tokenizer, "forgetfilter filter out", sources=sources) as review:
        thread = Thread(target=review.server.serve_forever)
        thread.start()
        try:
            yield review.address
        finally:
            review.server.shutdown()  # otherwise a test that fails would never end
            thread.join()


@pytest.fixture
def running(trace, byte_tokenizer, sources) -> Iterator[str]:
    """The address of a review that runs."""
    with served(trace, byte_tokenizer, sources) as address:
        yield address


def test_a_second_review_of_the_folder_is_refused(trace, byte_tokenizer):
    (trace.folder / "review").mkdir()
    with (
        FileLock(trace.folder / "review" / ".lock"),
        pytest.raises(DecisionError, match=r"Another review of .* is running"),
        review_server(trace, byte_tokenizer, "forgetfilter filter out"),
    ):
        pass
    with review_server(trace, byte_tokenizer, "forgetfilter filter out"):  # the folder is free again
        pass


def test_a_port_in_use_is_refused(trace, byte_tokenizer, running):
    port = int(running.split(":")[2].split("/")[0])
    other = Trace.create(trace.folder.parent / "other", trace.rows, "tiny", None, None)
    for record in trace.records():
        states = trace.states(record) if record == Record("safety", 0) else None
        other.append(record, [Scores(trace.token_losses(record), states)])
    with (
        pytest.raises(DecisionError, match=f"Port {port} of 127.0.0.1 cannot be used"),
        review_server(other, byte_tokenizer, "forgetfilter filter out", port),
    ):
        pass


def test_each_review_has_its_own_token_and_listens_on_this_machine_only(trace, byte_tokenizer):
    tokens = set()
    for _ in range(2):
        with review_server(trace, byte_tokenizer, "forgetfilter filter out") as review:
            tokens.add(review.address.split("/")[3])
            assert review.server.socket.getsockname() == ("127.0.0.1", review.port)
    assert len(tokens) == 2 and min(map(len, tokens)) >= 43  # 256 bits


@pytest.fixture
def page(browser, running):
    """The opened page. Afterwards checks that there were no console messages, errors, dialogs or foreign requests."""
    events = []
    opened = browser.new_page()
    opened.on("console", lambda message: events.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: events.append(f"error: {error}"))
    opened.on("dialog", lambda dialog: (events.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    opened.on("request", lambda request: request.url.startswith(running) or events.append(f"request: {request.url}"))
    opened.goto(running)
    expect(opened.locator("#row-title")).not_to_be_empty()
    yield opened
    opened.close()
    assert events == []


def shown_row(page) -> int:
    return int(page.inner_text("#row-title").removeprefix("Row "))


@needs_chromium
def test_reviewing_with_the_keyboard(page, trace):
    rows = [shown_row(page)]
    expect(page.locator("#removal")).to_be_hidden()  # no row is unsafe yet
    for key, counts in (("u", "1 of 120 rows reviewed, 1 unsafe"), ("s", "2 of 120 rows reviewed, 1 unsafe")):
        page.keyboard.press(key)
        expect(page.locator("#counts")).to_have_text(counts)
        rows.append(shown_row(page))
    expect(page.locator("#removal")).to_have_text("This command removes the unsafe rows: forgetfilter filter out")
    page.keyboard.press("Space")
    expect(page.locator("#row-title")).not_to_have_text(f"Row {rows[2]}")
    page.keyboard.press("z")
    expect(page.locator("#row-title")).to_have_text(f"Row {rows[2]}")
    page.keyboard.press("z")
    expect(page.locator("#row-title")).to_have_text(f"Row {rows[1]}")
    expect(page.locator("#previous")).to_have_text("Your verdict was: safe. A new one replaces it; space keeps it.")
    expect(page.locator("#round")).to_have_text("8 rows until the next ranking")  # without the one that has a verdict
    page.keyboard.press("Control+u")  # a shortcut of the browser
    page.keyboard.press("U")
    expect(page.locator("#counts")).to_have_text("2 of 120 rows reviewed, 2 unsafe")
    page.click("#safe")
    expect(page.locator("#counts")).to_have_text("3 of 120 rows reviewed, 2 unsafe")
    assert stored(trace) == [(rows[0], "unsafe"), (rows[1], "safe"), (rows[1], "unsafe"), (rows[2], "safe")]
    expect(page.locator("#round")).to_have_text("7 rows until the next ranking")
    assert not page.is_visible("#by-source") and not page.is_visible("#row-source")


@needs_chromium
def test_how_many_unsafe_rows_can_be_left(page):
    """The interval is shown when a random row has a verdict: at least one of the ten rows of the first round is random."""
    left = page.locator("#left")
    expect(left).to_have_text(
        "Unsafe rows not found yet: not known until a row that was drawn at random has a verdict."
    )
    for seen in range(1, 11):
        page.keyboard.press("s")
        expect(page.locator("#counts")).to_have_text(f"{seen} of 120 rows reviewed, 0 unsafe")
    expect(left).to_have_text(re.compile(r"not found yet: \d+ to \d+ \(90 % interval, from 1 row drawn at random\)\."))


@needs_chromium
def test_the_chat_template_is_hidden(browser, byte_tokenizer, tmp_path):
    """It is the same text in every row. A button shows it."""
    begin, end = "<eos>system\nBe brief.<eos>\n<eos>user\n", "<eos>\n<eos>assistant\n"
    turns = "Hello<eos>\n<eos>assistant\nHi<eos>\n<eos>user\n"  # three rows begin with the same turns
    asked = [f"{turns if row < 3 else ''}Question {row}?" for row in range(12)]
    rows = [{"prompt": f"{begin}{asked[row]}{end}", "completion": f"Answer {row}<eos>"} for row in range(12)]
    encoded = encode_rows(rows, byte_tokenizer, disable_tqdm=True)
    trace = Trace.create(tmp_path / "trace", encoded, "tiny", None, None)
    states = np.r_[np.ones((3, 4)), np.eye(9, 4)].astype(np.float16)  # these three are similar
    for step in (0, 4):
        losses = np.random.default_rng(step).random(encoded.loss_offsets[-1], np.float32)
        trace.append(Record("safety", step), [Scores(losses, states)])
    with served(trace, byte_tokenizer) as address:
        opened = browser.new_page()
        opened.goto(address)
        prompt = "document.getElementById('prompt').textContent"
        for number in range(12):
            expect(opened.locator("#counts")).to_contain_text(f"{number} of 12 rows reviewed")
            row = shown_row(opened)
            assert opened.evaluate(prompt) == asked[row]
            expect(opened.locator("#template")).to_have_text("show the chat template")
            opened.click("#template")
            assert opened.evaluate(prompt) == f"{begin}{asked[row]}{end}"
            expect(opened.locator("#template")).to_have_text("hide the chat template")
            opened.click("#template")
            assert all("Be brief" not in text for text in opened.locator("#similar .text").all_inner_texts())
            opened.keyboard.press("s")
        expect(opened.locator("#counts")).to_contain_text("12 of 12 rows reviewed")
        opened.close()


@needs_chromium
def test_a_prompt_that_is_cut_inside_the_chat_template_is_shown_without_it(
    browser, byte_tokenizer, monkeypatch, tmp_path
):
    begin, end = "<eos>system\nBe brief.<eos>\n<eos>user\n", "<eos>\n<eos>assistant\n"
    # Short ones are not cut, and long ones inside the question. What is left of these begins like an end of the template.
    beginnings = ["", "Why? " * 5, "x" * 60 + " user\n"]
    asked = [f"{beginnings[row % 3]}Question {row}?" for row in range(9)]
    monkeypatch.setattr(session_module, "MAX_ROW_LENGTH", len(f"e brief.<eos>\n<eos>user\n{asked[1]}{end}"))
    rows = [{"prompt": f"{begin}{asked[row]}{end}", "completion": f"Answer {row}<eos>"} for row in range(9)]
    encoded = encode_rows(rows, byte_tokenizer, disable_tqdm=True)
    trace = Trace.create(tmp_path / "trace", encoded, "tiny", None, None)
    for step in (0, 4):
        losses = np.random.default_rng(step).random(encoded.loss_offsets[-1], np.float32)
        trace.append(Record("safety", step), [Scores(losses, np.eye(9, 4, dtype=np.float16))])
    with served(trace, byte_tokenizer) as address:
        opened = browser.new_page()
        opened.goto(address)
        for number in range(9):
            expect(opened.locator("#counts")).to_contain_text(f"{number} of 9 rows reviewed")
            row = shown_row(opened)
            shown = opened.evaluate("document.getElementById('prompt').textContent")
            if row % 3 < 2:  # at most the template is cut
                assert shown == asked[row]
            else:
                assert shown == f"[…] user\nQuestion {row}?"
            opened.click("#template")
            with_template = opened.evaluate("document.getElementById('prompt').textContent")
            beginning = [begin, "[…] brief.<eos>\n<eos>user\n", "[…] "][row % 3]
            assert with_template.startswith(beginning) and with_template.endswith(end)
            opened.click("#template")
            opened.keyboard.press("s")
        opened.close()


@needs_chromium
@pytest.mark.parametrize(
    "answer", [{"status": 500, "json": {"problem": "The record is damaged."}}, None], ids=["error", "none"]
)
def test_the_page_needs_no_template(answer, browser, running):
    """If the prompts of other rows cannot be read, the row is shown with the template."""
    opened = browser.new_page()
    opened.route("**/prompts", lambda route: route.abort() if answer is None else route.fulfill(**answer))
    opened.goto(running)
    expect(opened.locator("#row-title")).not_to_be_empty()
    expect(opened.locator("#template")).to_be_hidden()
    opened.close()


@needs_chromium
def test_similar_rows_show_their_answers_first(page):
    page.evaluate("document.getElementById('similar').style.width = '1rem'")  # the texts are longer than their boxes
    row = shown_row(page)
    page.keyboard.press("Space")
    expect(page.locator("#row-title")).not_to_have_text(f"Row {row}")
    boxes = page.evaluate(
        "[...document.querySelectorAll('#similar .text')]"
        ".map((box) => [box.clientHeight, box.scrollHeight, box.scrollTop, box.lastChild.offsetTop])"
    )
    assert len(boxes) == 2
    for height, whole, top, answer in boxes:
        assert whole > height + 10 and answer > 10 and top == pytest.approx(min(answer, whole - height), abs=1)


def text_trace(rows: list[dict], tokenizer, folder) -> Trace:
    """A trace of a few rows that the model finds equally similar."""
    encoded = encode_rows(rows, tokenizer, disable_tqdm=True)
    trace = Trace.create(folder, encoded, "tiny", None, None)
    for step in (0, 4):
        losses = np.random.default_rng(step).random(encoded.loss_offsets[-1], np.float32)
        trace.append(Record("safety", step), [Scores(losses, np.eye(len(rows), 4, dtype=np.float16))])
    return trace


@needs_chromium
def test_a_row_without_a_prompt_is_one_text(browser, byte_tokenizer, tmp_path):
    """If the model is trained on a whole conversation, its first token is no prompt."""
    turns = ["<eos>user\nHello", "<eos>assistant\nHi"]
    rows = [{"text": "".join(turns[: 1 + row % 2]) + f" {row}<eos>"} for row in range(4)]
    with served(text_trace(rows, byte_tokenizer, tmp_path / "trace"), byte_tokenizer) as address:
        opened = browser.new_page()
        opened.goto(address)
        expect(opened.locator("#row-title")).not_to_be_empty()
        row = shown_row(opened)
        text = opened.get_by_role("region", name="Text", exact=True)
        expect(text).to_have_text(rows[row]["text"])
        expect(opened.locator("#with-prompt")).to_be_hidden()
        opened.close()


@needs_chromium
def test_the_parts_of_a_row_have_names(page):
    """A screen reader says which box has the focus."""
    for name in ("Prompt", "Answer", re.compile(r"Text of row \d+")):
        expect(page.get_by_role("region", name=name, exact=True).first).to_be_visible()


@needs_chromium
def test_an_empty_answer_says_so(browser, byte_tokenizer, tmp_path):
    rows = [{"prompt": f"Question {row}?", "completion": "<eos>"} for row in range(3)]
    with served(text_trace(rows, byte_tokenizer, tmp_path / "trace"), byte_tokenizer) as address:
        opened = browser.new_page()
        opened.goto(address)
        expect(opened.locator("#answer")).to_have_text("(empty) <eos>")
        opened.close()


@needs_chromium
@pytest.mark.parametrize("size", [(1280, 800), (1024, 600), (390, 844), (640, 400)], ids=str)
def test_the_answer_to_a_long_prompt_is_visible_without_scrolling(size, browser, byte_tokenizer, tmp_path):
    width, height = size
    rows = [{"prompt": f"Why {row}?\n" * 100, "completion": "No. " * 500} for row in range(30)]
    with served(text_trace(rows, byte_tokenizer, tmp_path / "trace"), byte_tokenizer, ["books"] * 30) as address:
        opened = browser.new_page(viewport={"width": width, "height": height})
        opened.goto(address)
        for number in range(3):
            expect(opened.locator("#counts")).to_contain_text(f"{number} of 30 rows reviewed")
            top = opened.locator("#answer").bounding_box()["y"]
            assert 0 <= top < opened.locator("footer").bounding_box()["y"] - 60
            opened.locator("summary").evaluate("summary => { summary.parentElement.open = true; }")
            opened.keyboard.press("End")
            opened.wait_for_function("() => scrollY + innerHeight > document.documentElement.scrollHeight - 2")
            answer, footer = opened.locator("#answer").bounding_box(), opened.locator("footer").bounding_box()
            assert answer["y"] + answer["height"] < footer["y"]  # the footer never hides its end
            opened.keyboard.press("s")
        opened.close()


@needs_chromium
def test_right_to_left_texts_begin_on_the_right(browser, byte_tokenizer, tmp_path):
    rows = [{"prompt": "?", "completion": "باريس Paris\nParis باريس"}] * 3
    with served(text_trace(rows, byte_tokenizer, tmp_path / "trace"), byte_tokenizer) as address:
        opened = browser.new_page()
        opened.goto(address)
        expect(opened.locator("#answer")).to_contain_text("Paris")
        words = opened.evaluate(
            """() => {
                const box = document.getElementById('answer').getBoundingClientRect();
                const pieces = [...document.querySelectorAll('#answer .piece')];
                const line = pieces.findIndex((each) => each.textContent === '\\n');
                return [pieces[0], pieces[line + 1]].map((each) => each.getBoundingClientRect().x - box.x > box.width / 2);
            }"""
        )
        assert words == [True, False]
        opened.close()


@needs_chromium
def test_a_lost_server_is_noticed_wherever_the_page_is_scrolled(browser, running):
    opened = browser.new_page(viewport={"width": 800, "height": 400})
    opened.goto(running)
    expect(opened.locator("#row-title")).not_to_be_empty()
    opened.route("**/verdict", lambda route: route.abort())
    opened.evaluate("scrollTo(0, 100000)")
    opened.keyboard.press("u")
    expect(opened.locator("#problem")).to_contain_text("The review does not answer.")
    expect(opened.locator("#problem")).to_be_in_viewport(ratio=1)
    opened.close()


@needs_chromium
def test_the_space_bar_opens_the_table_by_source(browser, trace, byte_tokenizer):
    with served(trace, byte_tokenizer, ["books"] * ROWS) as address:
        opened = browser.new_page()
        opened.goto(address)
        expect(opened.locator("#row-title")).not_to_be_empty()
        row = shown_row(opened)
        opened.focus("summary")
        opened.keyboard.press("Space")
        expect(opened.locator("#by-source table")).to_be_visible()
        assert shown_row(opened) == row
        opened.close()


@needs_chromium
def test_a_row_with_another_system_prompt_does_not_bring_the_template_back(browser, byte_tokenizer, tmp_path):
    begin, end = "<eos>system\nBe brief.<eos>\n<eos>user\n", "<eos>\n<eos>assistant\n"
    starts = [begin if row else "<eos>system\nBe rude.<eos>\n<eos>user\n" for row in range(5)]
    rows = [{"prompt": f"{starts[row]}Question {row}?{end}", "completion": "Yes<eos>"} for row in range(5)]
    with served(text_trace(rows, byte_tokenizer, tmp_path / "trace"), byte_tokenizer) as address:
        opened = browser.new_page()
        opened.goto(address)
        for number in range(5):
            expect(opened.locator("#counts")).to_contain_text(f"{number} of 5 rows reviewed")
            row = shown_row(opened)
            shown = f"Question {row}?" if row else f"{starts[0]}Question 0?"
            assert opened.evaluate("document.getElementById('prompt').textContent") == shown
            opened.keyboard.press("s")
        opened.close()


@needs_chromium
def test_a_key_that_is_held_down_counts_once(page, trace):
    page.keyboard.down("s")
    page.keyboard.down("s")
    page.keyboard.down("s")
    page.keyboard.up("s")
    expect(page.locator("#counts")).to_have_text("1 of 120 rows reviewed, 0 unsafe")
    assert len(stored(trace)) == 1


@needs_chromium
@pytest.mark.parametrize("fails", [False, True])
def test_the_page_says_if_an_answer_takes_long(browser, running, fails):
    opened = browser.new_page()
    opened.clock.install()
    held = []
    opened.route("**/verdict", lambda route: held.append(route))
    opened.goto(running)
    expect(opened.locator("#row-title")).not_to_be_empty()
    opened.keyboard.press("s")
    expect(opened.locator("#working")).to_be_hidden()
    opened.clock.run_for(1000)
    expect(opened.locator("#working")).to_be_visible()
    (route,) = held
    if fails:
        route.abort()
    else:
        route.continue_()
    expect(opened.locator("#working")).to_be_hidden()
    opened.close()


@needs_chromium
def test_the_page_is_silent_after_a_fast_answer(browser, running):
    opened = browser.new_page()
    opened.clock.install()
    opened.goto(running)
    expect(opened.locator("#row-title")).not_to_be_empty()
    opened.keyboard.press("s")
    expect(opened.locator("#counts")).to_contain_text("1 of")
    opened.clock.run_for(1000)
    expect(opened.locator("#working")).to_be_hidden()
    opened.close()


@needs_chromium
def test_the_space_bar_skips_after_a_click_on_a_button(page, trace):
    page.click("#unsafe")
    expect(page.locator("#counts")).to_have_text("1 of 120 rows reviewed, 1 unsafe")
    row = shown_row(page)
    page.keyboard.press("Space")
    expect(page.locator("#row-title")).not_to_have_text(f"Row {row}")
    assert len(stored(trace)) == 1


@needs_chromium
def test_hostile_texts_are_shown_as_they_are(page):
    seen = set()
    for number in range(60):
        row = shown_row(page)
        text = HOSTILE[row % len(HOSTILE)]
        seen.add(text)
        shown = "".join(
            f"U+{ord(character):04X}" if ord(character) < 32 or character in "\u202e\u2066" else character
            for character in text
        )
        assert page.evaluate("document.getElementById('answer').textContent").startswith(shown)
        # Texts become spans and no other elements.
        assert page.evaluate(
            "[...document.querySelectorAll('.text *')].every((e) => ['SPAN', 'DIV'].includes(e.tagName))"
        )
        page.keyboard.press("s")
        expect(page.locator("#counts")).to_have_text(f"{number + 1} of 120 rows reviewed, 0 unsafe")
        if len(seen) == len(HOSTILE):
            break
    assert seen == set(HOSTILE)


@needs_chromium
@pytest.mark.parametrize("sources", [[SOURCES[row % len(SOURCES)] for row in range(ROWS)]], ids=["hostile"])
def test_sources_are_shown_as_text(page):
    cells = "[...document.querySelectorAll('#sources tr')].map((tr) => [...tr.cells].map((cell) => cell.textContent))"
    seen: dict[str, int] = {}
    for number in range(20):
        expect(page.locator("#counts")).to_have_text(f"{number} of 120 rows reviewed, 0 unsafe")
        source = source_of(shown_row(page))
        assert page.evaluate("document.getElementById('row-source').textContent") == f"Source: {source}"
        similar = page.evaluate("[...document.querySelectorAll('#similar .source')].map((each) => each.textContent)")
        assert len(similar) == 2 and set(similar) <= {source_of(row) for row in range(ROWS)}
        assert {name: numbers for name, *numbers in page.evaluate(cells)} == {
            name: ["10", str(count), "0"] for name, count in seen.items()
        }
        seen[source] = seen.get(source, 0) + 1
        page.keyboard.press("s")
    page.click("summary")
    assert page.is_visible("#sources") and page.locator(".source *").count() == 0


@needs_chromium
def test_two_windows_do_not_overwrite_each_other(browser, running, trace):
    first, second = browser.new_page(), browser.new_page()
    for window in (first, second):
        window.goto(running)
        expect(window.locator("#row-title")).not_to_be_empty()
    row = shown_row(first)
    first.keyboard.press("u")
    expect(first.locator("#counts")).to_contain_text("1 of 120")
    second.keyboard.press("s")
    expect(second.locator("#problem")).to_contain_text(f"Row {row} is not the current row, so nothing was stored.")
    expect(second.locator("#row-title")).to_have_text(first.inner_text("#row-title"))
    assert stored(trace) == [(row, "unsafe")]
    first.close()
    second.close()


@needs_chromium
@pytest.mark.parametrize("look", ["dark", "phone"])
def test_dark_mode_and_phone_width(browser, running, look):
    size = {"width": 390, "height": 800} if look == "phone" else {"width": 1200, "height": 800}
    opened = browser.new_page(viewport=size, color_scheme="dark" if look == "dark" else "light")
    opened.goto(running)
    expect(opened.locator("#row-title")).not_to_be_empty()
    background, ink = (
        opened.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (background, ink)]
    assert (brightness[0] < brightness[1]) == (look == "dark") and abs(brightness[0] - brightness[1]) > 450
    assert opened.evaluate("document.documentElement.scrollWidth") <= size["width"]
    opened.close()
