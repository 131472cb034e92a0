"use strict";

let pictures = []; // { file, url, tiles }; tiles once the server has told
let shown = null;

function add(files) {
  complain("");
  const images = files.filter((file) => file.type.startsWith("image/"));
  const other = files.find((file) => !file.type.startsWith("image/"));
  if (other) complain(`“${other.name}” is not a picture.`);
  pictures = pictures.concat(images.map((file) => ({ file, url: URL.createObjectURL(file), tiles: null })));
  if (images.length) show(pictures[pictures.length - images.length]);
}

function remove(picture) {
  const place = pictures.indexOf(picture);
  pictures = pictures.filter((each) => each !== picture);
  show(picture === shown ? pictures[Math.min(place, pictures.length - 1)] ?? null : shown);
  ($("strip").querySelector("[aria-current] .pick") ?? $("files")).focus();
}

function show(picture) {
  shown = picture;
  $("stage").hidden = !picture;
  $("drop").hidden = !!picture;
  drawStrip();
  if (!picture) return;
  $("image").hidden = false;
  $("unshown").hidden = true;
  $("image").src = picture.url;
  $("image").alt = picture.file.name;
  $("name").textContent = picture.file.name;
  drawTiles();
}

function drawStrip() {
  $("strip").hidden = !pictures.length;
  const more = element("li", "more");
  const label = element("label", "", "+");
  label.htmlFor = "files";
  label.title = "Add pictures";
  more.append(label);
  $("strip").replaceChildren(...pictures.map(thumbnail), more);
}

function thumbnail(picture, place) {
  const item = element("li");
  if (picture === shown) item.setAttribute("aria-current", "true");
  const pick = button("pick", `Show picture ${place + 1}, ${picture.file.name}`, () => show(picture));
  pick.append(small(picture));
  const drop = button("drop", `Remove picture ${place + 1}, ${picture.file.name}`, () => remove(picture));
  drop.textContent = "×";
  item.append(pick, drop);
  return item;
}

function small(picture) {
  const image = element("img");
  image.src = picture.url;
  image.alt = "";
  return image;
}

/** The cuts that the model's processor made: equal parts of the picture, whatever its shape. */
function drawTiles() {
  const { rows = 0, cols = 0 } = shown.tiles ?? {};
  $("tiles").replaceChildren(...Array.from({ length: rows * cols }, (_, n) => tile(Math.floor(n / cols) + 1, (n % cols) + 1)));
  $("tiles").style.gridTemplate = rows ? `repeat(${rows}, 1fr) / repeat(${cols}, 1fr)` : "";
  $("tiles").hidden = !rows || $("toggle").getAttribute("aria-pressed") === "false";
  $("toggle").hidden = !rows;
  describe();
}

function tile(row, col) {
  const cell = element("span");
  cell.append(element("i", "", `${row}·${col}`));
  return cell;
}

function describe() {
  const image = $("image");
  const { width, height } = shown.tiles ?? { width: image.naturalWidth, height: image.naturalHeight };
  const pixels = width ? `${width} × ${height}` : "";
  $("size").textContent = [pixels, bytes(shown.file.size), shown.tiles && tilesText(shown.tiles)].filter(Boolean).join(" · ");
}

function tilesText({ rows, cols }) {
  return rows ? `${rows} × ${cols} tiles + overview` : "one tile";
}
