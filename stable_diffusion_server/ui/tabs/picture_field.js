// One picture field, after picture_upload.js: sends what is chosen or painted, and keeps the tokens as the value.
const [stage, image, canvas, video] = [".sds-stage", ".sds-stage img", "canvas", "video"].map(find);
const [drop, file, brushes] = [".sds-drop", "input[type=file]", ".sds-brushes"].map(find);
const SHARPEST = 2048; // pixels of the longer side of what is painted on; the mask itself has the picture's size

let [token, mask] = ["", ""];
let strokes = [];
let erases = false;
let changed = false; // painted since the mask was last sent
let sending = Promise.resolve();
let camera = null;

const value = () => [token, mask].filter(Boolean).join(" ");
const publish = () => { if (props.value !== value()) props.value = value(); };

const show = () => {
  stage.hidden = !token;
  drop.hidden = Boolean(token);
  button("remove").hidden = !token;
  if (brushes) brushes.hidden = !token;
  const source = token ? new URL(`pictures/${token}`, document.baseURI).href : "";
  if (!source) image.removeAttribute("src");
  else if (image.src !== source) image.src = source;
};

const adopt = (picture) => {
  [token, mask, strokes, changed] = [picture, "", [], false];
  show();
  publish();
};

const take = (blob) => {
  if (!blob) return;
  say("Sending the picture …");
  sending = sending.then(async () => {
    try {
      adopt(await transmit(blob, token));
      say("");
    } catch (error) {
      say(error.message);
    }
  });
};

const paintOn = (context) => {
  context.lineCap = context.lineJoin = "round";
  for (const { points, width, erasing } of strokes) {
    context.globalCompositeOperation = erasing ? "destination-out" : "source-over";
    context.lineWidth = width;
    context.beginPath();
    context.moveTo(...points[0]);
    for (const point of points.length > 1 ? points.slice(1) : points) context.lineTo(...point);
    context.stroke();
  }
};

const repaint = () => {
  const scale = Math.min(1, SHARPEST / Math.max(image.naturalWidth, image.naturalHeight));
  canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.strokeStyle = "#e000a8";
  paintOn(context);
};

const masked = () => {
  const whole = document.createElement("canvas");
  [whole.width, whole.height] = [image.naturalWidth, image.naturalHeight];
  const context = whole.getContext("2d");
  context.strokeStyle = "#fff";
  paintOn(context);
  context.globalCompositeOperation = "destination-over";
  context.fillRect(0, 0, whole.width, whole.height);
  return new Promise((done) => { whole.toBlob(done, "image/png"); });
};

// Sends what is painted, once for all that was painted while the last was on its way.
const sendMask = () => {
  changed = true;
  sending = sending.then(async () => {
    if (!changed || !token) return;
    changed = false;
    try {
      mask = strokes.length ? await transmit(await masked(), mask) : "";
      publish();
      say("");
    } catch (error) {
      changed = true;
      say(error.message);
    }
  });
};

const settled = async () => {
  if (changed) sendMask();
  await sending;
  return value();
};

const endCamera = () => {
  camera?.getTracks().forEach((track) => { track.stop(); });
  camera = null;
  video.hidden = true;
  button("webcam").textContent = "Webcam";
};

const photograph = async () => {
  if (camera) {
    const shot = document.createElement("canvas");
    [shot.width, shot.height] = [video.videoWidth, video.videoHeight];
    shot.getContext("2d").drawImage(video, 0, 0);
    endCamera();
    shot.toBlob(take, "image/png");
    return;
  }
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: true });
    video.srcObject = camera;
    video.hidden = false;
    await video.play();
    button("webcam").textContent = "Take the picture";
  } catch {
    endCamera();
    say("There is no webcam that this page may use.");
  }
};

const choose = (erasing) => {
  erases = erasing;
  button("brush").setAttribute("aria-pressed", String(!erasing));
  button("erase").setAttribute("aria-pressed", String(erasing));
};

const DEEDS = {
  paste: () => paste(take),
  webcam: photograph,
  brush: () => choose(false),
  erase: () => choose(true),
  undo: () => { if (strokes.pop()) { repaint(); sendMask(); } },
  remove: () => { adopt(""); file.value = ""; say(""); },
};
element.addEventListener("click", (event) => {
  const pressed = event.target.closest?.("[data-does]");
  if (pressed) DEEDS[pressed.dataset.does]();
});
file.addEventListener("change", () => { take(file.files[0]); file.value = ""; });
onGiven((files) => { take(files[0]); });
image.addEventListener("error", () => {
  if (!token) return;
  adopt("");
  say("This picture is not kept any more; choose it again.");
});

if (canvas) {
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [x * image.naturalWidth, y * image.naturalHeight];
  };
  image.addEventListener("load", repaint);
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    const width = Number(find(".sds-brush-size").value) * image.naturalWidth / canvas.getBoundingClientRect().width;
    strokes.push({ points: [at(event)], width, erasing: erases });
    repaint();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    strokes.at(-1).points.push(at(event));
    repaint();
  });
  canvas.addEventListener("lostpointercapture", sendMask);
}

// What another tab hands over, perhaps before this field is seen for the first time.
const receive = () => {
  if ((props.value ?? "") !== value()) adopt((props.value ?? "").split(" ")[0]);
};
watch("value", receive);
(window.sdsPictures ??= new Map()).set(element.closest("[id^=sds-]").id, settled);
show();
receive();
