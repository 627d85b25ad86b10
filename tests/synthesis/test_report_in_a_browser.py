"""The report as Chromium shows it, without a network: pictures, viewer, what its switches change."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from custom.synthesis.report import write_report
from report_sets import NAMES, make_set

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium: apt-get install chromium"),
]

OFFLINE = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update"]
SOFTWARE_WEBGL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
NO_WEBGL = ["--disable-gpu", "--disable-3d-apis"]

# Waits for the viewer, then calls `check(panes)`; what that returns becomes the title of the page.
HARNESS = """<script>
const byId = (id) => document.getElementById(id);
const change = (id, value, kind = "input") => {
  const control = byId(id);
  if (control.type === "checkbox") control.checked = value; else control.value = value;
  control.dispatchEvent(new Event(kind));
};
const press = (name) => [...document.querySelectorAll("#views button")].find((b) => b.textContent === name).click();
/** How many pixels of a pane are grey and neither black nor white, and how many are coloured; the crosshair apart. */
const pixels = ({ niivue }) => {
  const { gl } = niivue;
  niivue.drawScene();
  const all = new Uint8Array(4 * gl.drawingBufferWidth * gl.drawingBufferHeight);
  gl.readPixels(0, 0, gl.drawingBufferWidth, gl.drawingBufferHeight, gl.RGBA, gl.UNSIGNED_BYTE, all);
  const count = { grey: 0, red: 0, blue: 0 };
  for (let i = 0; i < all.length; i += 4) {
    const [r, g, b] = [all[i], all[i + 1], all[i + 2]];
    const range = Math.max(r, g, b) - Math.min(r, g, b);
    count.grey += range < 12 && r > 40 && r < 230;
    count.red += r - b > 60 && r - g > 25 && !(r > 200 && g > 180);
    count.blue += b - g > 60;
  }
  return count;
};
const settled = async () => {
  while (byId("stage")?.dataset.state !== "ready" && !byId("viewer").dataset.failed) {
    await new Promise((done) => setTimeout(done, 50));
  }
  while (!byId("viewer").panes && !byId("viewer").dataset.failed) await new Promise((done) => setTimeout(done, 50));
  return byId("viewer").panes;
};
settled().then(check).then((seen) => { document.title = JSON.stringify(seen); },
                           (error) => { document.title = JSON.stringify({ error: String(error) }); });
</script>"""


def seen(tmp_path, check, *, width=1280, options=SOFTWARE_WEBGL, **sets):
    """What a check in the page of a set returns, and what the browser's console said."""
    make_set(tmp_path, **sets)
    text = open(write_report(str(tmp_path), label_names=NAMES, vessel_labels=[3]), encoding="utf-8").read()
    page = tmp_path / "page.html"
    script = f"<script>const check = async (panes) => {{{check}}};</script>{HARNESS}"
    page.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--no-first-run", "--disable-sync", "--enable-logging=stderr"]
    command += [*OFFLINE, *options, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=60000", "--dump-dom", f"file://{page}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout).group(1)
    return json.loads(title.replace("&quot;", '"')), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [390, 1280])
def test_all_pictures_and_the_viewer_fit_the_screen_without_an_error(tmp_path, width):
    check = """return {
      pictures: [...document.images].filter((image) => image.complete && image.naturalWidth > 0).length,
      all: document.images.length,
      fits: document.documentElement.scrollWidth <= window.innerWidth,
      canvases: [...document.querySelectorAll("canvas")].map((canvas) => canvas.clientWidth),
      width: window.innerWidth, note: byId("viewer-missing").hidden, cases: byId("case").length }"""
    found, console = seen(tmp_path, check, width=width)
    assert found["pictures"] == found["all"] == 6
    assert found["fits"]
    assert len(found["canvases"]) == 2
    assert all(250 < canvas <= found["width"] for canvas in found["canvases"])
    assert found["note"]
    assert found["cases"] == 2
    assert console == []


def test_the_viewer_shows_anatomy_labels_and_doubt(tmp_path):
    check = """
      const all = () => panes.map(pixels);
      const found = { labelled: all() };
      change("labels-on", false); found.plain = all();
      change("doubt-on", true); found.doubted = all();
      change("doubt-on", false); change("labels-on", true); press("3D"); found.solid = all();
      press("axial"); change("labels-opacity", 1); found.opaque = all();
      change("labels-on", false); change("window", "lung", "change"); found.lung = all();
      return found"""
    found, console = seen(tmp_path, check)
    assert "error" not in found, found
    assert console == []
    for pane in (0, 1):
        plain = found["plain"][pane]
        assert plain["grey"] > 5000  # anatomy, where the canvas is else black
        assert plain["red"] + plain["blue"] < 100  # rims of crosshair and letters
        assert found["labelled"][pane]["red"] > 2000  # the colours of wall and blood
        assert found["opaque"][pane]["red"] > 2000
        assert found["solid"][pane]["red"] > 2000
        assert found["solid"][pane]["grey"] < found["labelled"][pane]["grey"] / 2  # the labels alone
        assert abs(found["lung"][pane]["grey"] - found["plain"][pane]["grey"]) > 500
    assert found["doubted"][0]["red"] > 1000
    assert found["doubted"][1] == found["plain"][1]  # a template has no confidence


def test_the_patients_right_is_on_the_left_and_a_key_moves_both_crosshairs(tmp_path):
    check = """
      press("axial");
      const at = () => panes.map(({ niivue }) => [...niivue.frac2mm(niivue.scene.crosshairPos)].slice(0, 3));
      panes[0].canvas.focus();
      const before = at(), read = panes[1].reading.textContent;
      const key = (name) => panes[0].canvas.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
      for (let step = 0; step < 9; step++) key("ArrowLeft");
      const { niivue, canvas } = panes[0];
      const corner = (x) => { // mm of the left and right edge of what is drawn
        const frac = niivue.canvasPos2frac([x * canvas.width, canvas.height / 2]);
        return frac[0] < 0 ? null : niivue.frac2mm(frac)[0];
      };
      const now = panes[1].reading.textContent;
      return { before, after: at(), left: corner(0.35), right: corner(0.65), read, now }"""
    found, console = seen(tmp_path, check)
    assert "error" not in found, found
    assert console == []
    for before, after in zip(found["before"], found["after"], strict=True):
        assert after[0] - before[0] > 5  # mm to the patient's right, in both
        assert after[1:] == pytest.approx(before[1:], abs=0.6)
    assert found["left"] > found["right"]  # x grows to the right of the patient
    assert "HU" in found["read"]
    assert found["now"] != found["read"]


def test_a_browser_without_webgl_keeps_the_pictures_and_says_why(tmp_path):
    check = """return { note: byId("viewer-missing").textContent, hidden: byId("stage").hidden,
      pictures: [...document.images].filter((image) => image.naturalWidth > 0).length }"""
    found, _ = seen(tmp_path, check, options=NO_WEBGL)
    assert found["hidden"]
    assert found["pictures"] == 6
    assert found["note"].startswith("No viewer: this browser has no WebGL2 or it is off.")
