// The viewer of the report: one synthetic case and its template, side by side, with NiiVue from this page.
// It asks nobody for anything: library and volumes stand in the page, and the page forbids requests.

const WINDOWS = {
  "heart, contrast": [-250, 650],
  "soft tissue": [-160, 240],
  lung: [-1350, 150],
  bone: [-450, 1050],
};
const VIEWS = { "three planes": 3, axial: 0, coronal: 1, sagittal: 2, "3D": 4 }; // numbers are NiiVue's slice types
const IN_3D = [120, 600]; // HU: blood with contrast and bone, without the tissue around them
const FROM_THE_FRONT = [165, 10]; // degrees, a little from the patient's left, where the coronaries lie
const [IMAGE, LABEL, DOUBT] = [0, 1, 2]; // layers of a pane

const byId = (id) => document.getElementById(id);
const readText = (id) => byId(id).textContent.trim();

function make(tag, properties = {}, children = []) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function unpacked(base64) {
  const bytes = Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function loadLibrary() {
  const source = new Blob([await unpacked(readText("niivue"))], { type: "text/javascript" });
  const address = URL.createObjectURL(source);
  try {
    return await import(address);
  } finally {
    URL.revokeObjectURL(address);
  }
}

function labelColours(labels) {
  const channel = (from) => labels.map(({ colour }) => parseInt(colour.slice(from, from + 2), 16));
  return {
    R: channel(1), G: channel(3), B: channel(5),
    A: labels.map((_, id) => (id === 0 ? 0 : 255)),
    I: labels.map((_, id) => id),
    labels: labels.map(({ name }) => name),
  };
}

class Pane {
  /** One canvas with what it shows: layers of one case. */
  constructor(library, name, labels) {
    this.library = library;
    this.labels = labels;
    this.canvas = byId(`${name}-canvas`);
    this.title = byId(`${name}-title`);
    this.reading = byId(`${name}-reading`);
    this.niivue = new library.Niivue({
      isRadiologicalConvention: true, sagittalNoseLeft: true, // right of the patient and front of the chest: left
      crosshairColor: [1, 0.84, 0.42, 0.8], crosshairWidth: 0.6, crosshairWidthUnit: "mm", crosshairGap: 12,
      fontColor: [1, 0.84, 0.42, 1], showAllOrientationMarkers: true, backColor: [0, 0, 0, 1], isColorbar: false,
      multiplanarShowRender: library.SHOW_RENDER.NEVER, show3Dcrosshair: false, isOrientCube: true, tileMargin: 6,
      dragAndDropEnabled: false, loadingText: "", logLevel: "error",
    });
    this.niivue.onLocationChange = () => this.onMove?.();
  }

  async start() {
    await this.niivue.attachToCanvas(this.canvas);
    this.niivue.addColormap("doubt", { R: [255, 255, 255], G: [210, 210, 0], B: [0, 0, 0], A: [0, 255, 255], I: [0, 1, 255] });
    this.niivue.setRenderAzimuthElevation(...FROM_THE_FRONT);
  }

  async show(volumes, title) {
    this.title.textContent = title;
    for (const volume of [...this.niivue.volumes].reverse()) this.niivue.removeVolume(volume);
    for (const name of ["image", "label", "doubt"]) {
      if (volumes[name]) await this.niivue.loadFromArrayBuffer(await unpacked(volumes[name]), `${name}.nii`);
    }
    const [, label, doubt] = this.niivue.volumes;
    label.setColormapLabel(labelColours(this.labels));
    const fading = this.library.COLORMAP_TYPE.ZERO_TO_MAX_TRANSLUCENT_BELOW_MIN; // little doubt is hardly seen
    if (doubt) Object.assign(doubt, { colormap: "doubt", cal_min: 60, cal_max: 100, colormapType: fading });
    this.niivue.scene.crosshairPos = this.niivue.mm2frac([0, 0, 0]); // the centre of the heart
  }

  apply({ view, window, labels, doubt }) {
    const { niivue } = this;
    const solid = view === VIEWS["3D"];
    const [low, high] = solid ? IN_3D : window;
    Object.assign(niivue.volumes[IMAGE], { cal_min: low, cal_max: high });
    niivue.volumes[IMAGE].opacity = solid && labels > 0 ? 0 : 1; // in 3D the labels alone, else what has contrast
    niivue.volumes[LABEL].opacity = solid && labels > 0 ? 1 : labels;
    if (niivue.volumes[DOUBT]) niivue.volumes[DOUBT].opacity = solid ? 0 : doubt;
    niivue.opts.sliceType = view;
    niivue.updateGLVolume();
    this.read();
  }

  /** What stands under the crosshair, in words. */
  read() {
    const at = [...this.niivue.frac2mm(this.niivue.scene.crosshairPos)].slice(0, 3);
    const values = this.niivue.volumes.map((volume) => volume.getValue(...volume.mm2vox(at)));
    const name = values[LABEL] ? this.labels[values[LABEL]]?.name : "no label";
    const trust = values.length > DOUBT ? `, confidence ${(1 - values[DOUBT] / 100).toFixed(2)}` : "";
    this.reading.textContent = `${Math.round(values[IMAGE])} HU, ${name}${trust}`;
  }
}

function refuseWheelUntilFocused(canvas) {
  const unlessFocused = (event) => {
    if (document.activeElement !== canvas) event.stopImmediatePropagation();
  };
  canvas.addEventListener("wheel", unlessFocused, { capture: true }); // else the page could not be scrolled past it
}

function moveByKeys(pane) {
  const steps = {
    ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
    PageUp: [0, 0, 1], PageDown: [0, 0, -1],
  };
  pane.canvas.addEventListener("keydown", (event) => {
    event.stopImmediatePropagation(); // NiiVue's own letters do other things
    if (!steps[event.key]) return;
    event.preventDefault();
    pane.niivue.moveCrosshairInVox(...steps[event.key]);
    pane.onMove();
  }, { capture: true });
}

function buttons(group, names, chosen, onChoose) {
  const all = names.map((name) => make("button", { type: "button", textContent: name }));
  const press = (one) => all.forEach((button) => button.setAttribute("aria-pressed", String(button === one)));
  all.forEach((button) => button.addEventListener("click", () => { press(button); onChoose(button.textContent); }));
  press(all[names.indexOf(chosen)]);
  byId(group).append(...all);
}

async function run() {
  if (!document.createElement("canvas").getContext("webgl2")) throw new Error("this browser has no WebGL2 or it is off");
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old; it cannot unpack the volumes");
  const data = JSON.parse(readText("volumes"));
  const library = await loadLibrary();
  byId("stage").hidden = false; // a canvas needs its size before it is drawn on
  const panes = ["synthetic", "template"].map((name) => new Pane(library, name, data.labels));
  const settings = { view: 3, window: WINDOWS["heart, contrast"], labels: 0.45, doubt: 0 };
  const apply = () => panes.forEach((pane) => pane.apply(settings));
  for (const [pane, other] of [panes, [...panes].reverse()]) {
    await pane.start();
    pane.niivue.broadcastTo([other.niivue], { "2d": true, "3d": true });
    pane.onMove = () => panes.forEach((each) => each.niivue.volumes.length > 1 && each.read());
    refuseWheelUntilFocused(pane.canvas);
    moveByKeys(pane);
  }
  const choose = async (index) => {
    const { case: name, note, template, synthetic } = data.cases[index];
    byId("stage").dataset.state = "loading";
    await panes[0].show(synthetic, `synthetic: ${name}, ${note}`);
    await panes[1].show(data.templates[template], `template: ${template}`);
    apply();
    byId("stage").dataset.state = "ready";
  };

  byId("case").append(...data.cases.map(({ case: name }, index) => make("option", { value: index, textContent: name })));
  byId("case").addEventListener("change", (event) => choose(Number(event.target.value)));
  byId("window").append(...Object.keys(WINDOWS).map((name) => make("option", { textContent: name })));
  byId("window").addEventListener("change", (event) => { settings.window = WINDOWS[event.target.value]; apply(); });
  buttons("views", Object.keys(VIEWS), "three planes", (name) => {
    settings.view = VIEWS[name];
    byId("panes").className = name === "three planes" ? "rows" : "";
    apply();
  });
  const mixing = () => {
    settings.labels = byId("labels-on").checked ? Number(byId("labels-opacity").value) : 0;
    settings.doubt = byId("doubt-on").checked ? 0.9 : 0;
    apply();
  };
  for (const id of ["labels-on", "labels-opacity", "doubt-on"]) byId(id).addEventListener("input", mixing);
  await choose(0);
  return panes;
}

run().then(
  (panes) => { byId("viewer").panes = panes; byId("viewer-missing").hidden = true; },
  (error) => {
    byId("stage").hidden = true;
    byId("viewer-missing").textContent = `No viewer: ${error.message}. The pictures above show the same cases.`;
    byId("viewer").dataset.failed = error.message;
  },
);
