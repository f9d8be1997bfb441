"""The worker's thread: newest image wins, vocabularies are prepared in between, nothing stops it."""

import threading
import time

import pytest

from nerve_ros.worker import QUESTIONS, Mailbox, Worker

PATIENCE = 30.0


def test_the_newest_item_wins_and_the_replaced_one_is_handed_back():
    mailbox = Mailbox()
    assert not mailbox.waiting
    assert [mailbox.put(item) for item in ("a", "b", "c")] == [None, "a", "b"]
    assert mailbox.waiting
    assert [mailbox.take(), mailbox.take()] == ["c", None]
    assert mailbox.put("d") is None


def test_an_item_is_put_back_only_where_no_newer_one_waits():
    mailbox = Mailbox()
    assert mailbox.put_if_empty("a")
    assert not mailbox.put_if_empty("b")
    assert mailbox.take() == "a"


class Bench:
    """A worker whose work is written down, and held up at a gate where a test wants that."""

    def __init__(self, *, steps=0, min_interval=0.0):
        self.steps = steps
        self.enabled = True
        self.gate = threading.Event()
        self.gate.set()
        self.log = []
        self.starts = []
        self.news = threading.Condition()
        self.bad = set()
        self.worker = Worker(
            process=self.process,
            prepare=self.prepare,
            adopt=lambda request, snapshot: self.write("adopt", request),
            abandon=lambda request, error: self.write("abandon", request, type(error).__name__),
            answer=lambda question: self.write("answer", question),
            failed=lambda error: self.write("failed", str(error)),
            min_interval=lambda: min_interval,
            enabled=lambda: self.enabled,
        )

    def write(self, *entry):
        with self.news:
            self.log.append(entry)
            self.news.notify_all()

    def process(self, image, snapshot):
        self.starts.append(time.monotonic())
        self.write("begin", image, snapshot)
        assert self.gate.wait(PATIENCE)
        if image in self.bad:
            raise RuntimeError(f"bad {image}")
        self.write("end", image, snapshot)

    def prepare(self, request):
        for step in range(self.steps):
            self.write("step", request, step)
            yield
        if request in self.bad:
            raise RuntimeError(f"bad {request}")
        return request.upper()

    def wait(self, *entry):
        with self.news:
            assert self.news.wait_for(lambda: entry in self.log, PATIENCE), (entry, self.log)

    def start(self, request="a"):
        self.worker.request(request)
        self.worker.submit(self.worker.prepare_now).result(PATIENCE)
        self.worker.resume()


@pytest.fixture
def bench():
    benches = []

    def make(**options):
        benches.append(Bench(**options))
        return benches[-1]

    yield make
    for made in benches:
        made.gate.set()
        assert made.worker.close(PATIENCE)


def test_of_the_images_that_come_during_one_only_the_newest_is_worked_on(bench):
    b = bench()
    b.start()
    b.gate.clear()
    assert b.worker.offer(1)
    b.wait("begin", 1, "A")
    assert [b.worker.offer(image) for image in (2, 3, 4)] == [True, False, False]
    b.gate.set()
    b.wait("end", 4, "A")
    assert [entry[1] for entry in b.log if entry[0] == "begin"] == [1, 4]


def test_no_image_is_worked_on_before_a_vocabulary_is_there_or_while_paused(bench):
    b = bench()
    b.worker.resume()
    b.worker.offer(1)
    b.worker.submit(lambda: None).result(PATIENCE)
    b.worker.pause()
    b.start()
    b.worker.pause()
    b.worker.offer(2)
    b.worker.submit(lambda: None).result(PATIENCE)
    assert not [entry for entry in b.log if entry[0] == "begin"]
    b.worker.resume()
    b.wait("end", 2, "A")


def test_pausing_forgets_the_image_that_waits(bench):
    b = bench()
    b.start()
    b.gate.clear()
    b.worker.offer(1)
    b.wait("begin", 1, "A")
    b.worker.offer(2)
    b.worker.pause()
    b.worker.resume()
    assert b.worker.offer(3), "the slot should be empty"
    b.gate.set()
    b.wait("end", 3, "A")
    assert ("begin", 2, "A") not in b.log


def test_images_are_worked_on_between_the_steps_of_a_vocabulary_with_the_old_one(bench):
    b = bench(steps=5)
    b.start()
    b.gate.clear()
    b.worker.offer(1)
    b.wait("begin", 1, "A")
    b.worker.request("b")
    done = threading.Event()

    def camera():
        image = 2
        while not done.is_set():
            b.worker.offer(image)
            image += 1
            time.sleep(0.001)

    thread = threading.Thread(target=camera)
    thread.start()
    try:
        b.worker.offer(100)
        b.gate.set()
        b.wait("adopt", "b")
    finally:
        done.set()
        thread.join()
    steps = [place for place, entry in enumerate(b.log) if entry[:2] == ("step", "b")]
    between = b.log[steps[0] : b.log.index(("adopt", "b"))]
    served = [entry for entry in between if entry[0] == "begin"]
    assert served
    assert {entry[2] for entry in served} == {"A"}
    after = [entry for entry in b.log[b.log.index(("adopt", "b")) :] if entry[0] == "begin"]
    assert {entry[2] for entry in after} <= {"B"}


def test_a_newer_request_ends_the_preparation_of_an_older_one(bench):
    b = bench(steps=1000)
    b.steps = 0
    b.start()
    b.steps = 10**9
    b.worker.request("b")
    b.wait("step", "b", 10)
    b.steps = 1
    b.worker.request("c")
    b.wait("adopt", "c")
    b.wait("abandon", "a", "NoneType")
    assert ("abandon", "b", "NoneType") in b.log
    assert ("adopt", "b") not in b.log
    assert b.worker.snapshot == "C"


def test_a_request_replaced_before_its_preparation_began_is_handed_back(bench):
    b = bench()
    b.start()
    b.gate.clear()
    b.worker.offer(1)
    b.wait("begin", 1, "A")
    assert b.worker.request("b") is None
    assert b.worker.request("c") == "b"
    b.gate.set()
    b.wait("adopt", "c")


def test_a_vocabulary_that_fails_leaves_the_old_one_serving(bench):
    b = bench()
    b.start()
    b.bad.add("b")
    b.worker.request("b")
    b.wait("abandon", "b", "RuntimeError")
    b.worker.offer(1)
    b.wait("end", 1, "A")


def test_an_image_that_fails_is_told_and_the_next_one_is_worked_on(bench):
    b = bench()
    b.start()
    b.bad.add(1)
    b.worker.offer(1)
    b.wait("failed", "bad 1")
    b.worker.offer(2)
    b.wait("end", 2, "A")


def test_a_job_that_fails_gives_its_error_to_who_asked_and_the_thread_goes_on(bench):
    b = bench()

    def job():
        raise KeyError("no")

    with pytest.raises(KeyError):
        b.worker.submit(job).result(PATIENCE)
    assert b.worker.submit(lambda: 7).result(PATIENCE) == 7


def test_a_request_whose_preparation_failed_at_load_waits_for_the_next_load(bench):
    b = bench()
    b.bad.add("a")
    b.worker.request("a")
    with pytest.raises(RuntimeError, match="bad a"):
        b.worker.submit(b.worker.prepare_now).result(PATIENCE)
    b.bad.clear()
    b.worker.submit(b.worker.prepare_now).result(PATIENCE)
    assert b.worker.snapshot == "A"


def test_after_forgetting_the_last_vocabulary_is_prepared_again(bench):
    b = bench()
    b.start()
    b.worker.submit(b.worker.forget).result(PATIENCE)
    assert b.worker.snapshot is None
    b.worker.submit(b.worker.prepare_now).result(PATIENCE)
    assert b.worker.snapshot == "A"


def test_a_vocabulary_asked_for_while_forgotten_replaces_the_last_one(bench):
    b = bench()
    b.start()
    b.worker.submit(b.worker.forget).result(PATIENCE)
    assert b.worker.request("b") == "a"
    b.worker.submit(b.worker.prepare_now).result(PATIENCE)
    assert b.worker.snapshot == "B"


def test_images_start_no_faster_than_the_interval_and_the_newest_is_taken(bench):
    b = bench(min_interval=0.2)
    b.start()
    for image in range(1, 2000):
        b.worker.offer(image)
        if len(b.starts) >= 3:
            break
        time.sleep(0.005)
    gaps = [later - earlier for earlier, later in zip(b.starts, b.starts[1:], strict=False)]
    assert len(gaps) >= 2
    assert min(gaps) >= 0.199


# Questions.


def test_a_question_is_answered_from_the_image_that_waits(bench):
    b = bench()
    b.start()
    b.gate.clear()
    b.worker.offer(1)
    b.wait("begin", 1, "A")
    b.worker.offer(2)
    assert b.worker.ask("where?")
    b.gate.set()
    b.wait("answer", "where?")
    order = [entry[:2] for entry in b.log if entry[0] in ("end", "answer")]
    # It was asked before the first image was done: that one answers it. The newer one follows.
    assert order[:2] == [("end", 1), ("answer", "where?")]
    b.wait("end", 2, "A")


def test_a_question_is_answered_from_the_last_image_where_none_waits(bench):
    b = bench()
    b.start()
    b.worker.offer(1)
    b.wait("end", 1, "A")
    assert b.worker.ask("where?")
    b.wait("answer", "where?")
    assert [entry for entry in b.log if entry[0] == "begin"] == [("begin", 1, "A")]


def test_a_question_before_any_image_waits_for_the_first_and_one_that_fails_answers_too(bench):
    b = bench()
    b.bad.add(1)
    b.start()
    assert b.worker.ask("where?")
    b.worker.submit(lambda: None).result(PATIENCE)
    assert ("answer", "where?") not in b.log
    b.worker.offer(1)
    b.wait("failed", "bad 1")
    b.wait("answer", "where?")


def test_while_disabled_an_image_waits_until_a_question_or_until_enabled(bench):
    b = bench()
    b.enabled = False
    b.start()
    b.worker.offer(1)
    b.worker.offer(2)
    b.worker.submit(lambda: None).result(PATIENCE)
    assert not [entry for entry in b.log if entry[0] == "begin"]
    assert b.worker.ask("where?")
    b.wait("answer", "where?")
    assert [entry[1] for entry in b.log if entry[0] == "begin"] == [2]
    b.worker.offer(3)
    b.worker.submit(lambda: None).result(PATIENCE)
    assert ("begin", 3, "A") not in b.log
    b.enabled = True
    b.worker.wake()
    b.wait("end", 3, "A")


def test_a_question_does_not_wait_for_the_rate(bench):
    b = bench(min_interval=3600.0)
    b.start()
    b.worker.offer(1)
    b.wait("end", 1, "A")
    b.worker.offer(2)
    b.worker.submit(lambda: None).result(PATIENCE)
    assert ("begin", 2, "A") not in b.log
    assert b.worker.ask("where?")
    b.wait("end", 2, "A")
    b.wait("answer", "where?")


def test_only_so_many_questions_wait_and_a_pause_hands_them_back(bench):
    b = bench()
    b.start()
    assert [b.worker.ask(number) for number in range(QUESTIONS + 2)] == [True] * QUESTIONS + [False] * 2
    assert b.worker.pause() == (None, list(range(QUESTIONS)))
    b.worker.offer("late")
    assert b.worker.pause() == ("late", [])
    b.worker.resume()
    b.worker.offer(1)
    b.wait("end", 1, "A")
    assert not [entry for entry in b.log if entry[0] == "answer"]


def test_a_vocabulary_is_prepared_between_questions(bench):
    b = bench(steps=3)
    b.start()
    b.worker.offer(1)
    b.wait("end", 1, "A")
    done = threading.Event()

    def ask():
        while not done.is_set():
            b.worker.ask("where?")

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        b.worker.request("b")
        b.wait("adopt", "b")
    finally:
        done.set()
        asking.join()


# What is under way.


def test_it_is_told_how_long_an_image_takes_and_where_it_is_but_not_a_job(bench):
    b = bench()
    b.start()
    assert b.worker.busy_for == 0.0
    b.gate.clear()
    b.worker.offer(1)
    b.wait("begin", 1, "A")
    one = b.worker.busy_for
    assert 0.0 < one < PATIENCE
    assert b.worker.busy_for > one
    assert "self.gate.wait(PATIENCE)" in b.worker.stack()
    b.gate.set()
    b.wait("end", 1, "A")
    b.worker.submit(lambda: b.write("in a job", b.worker.busy_for)).result(PATIENCE)
    assert ("in a job", 0.0) in b.log
    assert b.worker.busy_for == 0.0
