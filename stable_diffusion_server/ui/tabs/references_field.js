// A field of several pictures in order, after picture_upload.js: its value is their tokens, separated by spaces.
const [list, drop, file] = [".sds-references", ".sds-drop", "input[type=file]"].map(find);
const most = Number(element.querySelector("[data-most]").dataset.most);

let tokens = [];
let sending = Promise.resolve();

const value = () => tokens.join(" ");

const tool = (does, sign, label, disabled) => {
  const made = document.createElement("button");
  [made.type, made.textContent, made.dataset.does, made.disabled] = ["button", sign, does, disabled];
  made.setAttribute("aria-label", label);
  return made;
};

const tile = (token, index) => {
  const [item, image, name, tools] = ["li", "img", "span", "span"].map((kind) => document.createElement(kind));
  const number = index + 1;
  item.dataset.token = token;
  image.src = new URL(`pictures/${token}`, document.baseURI).href;
  image.alt = `Picture ${number}`;
  image.addEventListener("error", () => {
    change(tokens.filter((one) => one !== token));
    say("A picture is not kept any more; choose it again.");
  });
  [name.className, name.textContent, tools.className] = ["sds-number", String(number), "sds-tools"];
  tools.append(
    tool("earlier", "←", `Move picture ${number} forward`, index === 0),
    tool("later", "→", `Move picture ${number} back`, number === tokens.length),
    tool("remove", "×", `Remove picture ${number}`, false),
  );
  item.append(image, name, tools);
  return item;
};

const show = () => {
  list.replaceChildren(...tokens.map(tile));
  list.hidden = button("clear").hidden = !tokens.length;
  drop.hidden = tokens.length >= most;
};

const change = (next) => {
  tokens = next;
  show();
  if (props.value !== value()) props.value = value();
};

const moved = (token, by) => {
  const next = tokens.filter((one) => one !== token);
  next.splice(tokens.indexOf(token) + by, 0, token);
  return next;
};

const send = async (blob) => {
  if (tokens.length >= most) throw new Error(`At most ${most} pictures fit in here.`);
  const token = await transmit(blob);
  change([...tokens, token]);
};

const take = (blobs) => {
  for (const blob of [blobs].flat().filter(Boolean)) {
    say("Sending the pictures …");
    sending = sending.then(async () => {
      try {
        await send(blob);
        say("");
      } catch (error) {
        say(error.message);
      }
    });
  }
};

const settled = async () => {
  await sending;
  return value();
};

const DEEDS = {
  paste: () => paste(take),
  clear: () => change([]),
  earlier: (token) => change(moved(token, -1)),
  later: (token) => change(moved(token, 1)),
  remove: (token) => change(tokens.filter((one) => one !== token)),
};
element.addEventListener("click", (event) => {
  const pressed = event.target.closest?.("[data-does]");
  if (!pressed) return;
  const { token } = pressed.closest("li")?.dataset ?? {};
  DEEDS[pressed.dataset.does](token);
  // The tiles are new: whoever uses the keyboard stays at the picture that was moved.
  const tools = [...list.children].find((item) => item.dataset.token === token)?.querySelectorAll("button:not([disabled])") ?? [];
  if (token) ([...tools].find((one) => one.dataset.does === pressed.dataset.does) ?? tools[0] ?? file).focus();
});
file.addEventListener("change", () => { take([...file.files]); file.value = ""; });
onGiven(take);

// What another tab hands over, perhaps before this field is seen for the first time.
const receive = () => {
  if ((props.value ?? "") !== value()) change((props.value ?? "").split(" ").filter(Boolean));
};
watch("value", receive);
(window.sdsPictures ??= new Map()).set(element.closest("[id^=sds-]").id, settled);
show();
receive();
