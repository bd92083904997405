const KEY = "paligemma-answers", MOST = 8;
const SIDE = 448, LONGEST = 80_000; // of the copies of pictures: the longer side, and the data URL
const JPEG = "data:image/jpeg;base64,";
const isText = (value) => typeof value === "string";
const isAnswer = (one) => isText(one?.path) && Array.isArray(one.more) && isText(one.picture)
    && Array.isArray(one.answers) && one.answers.every((pair) => Array.isArray(pair) && pair.every(isText));
let kept = [];
const read = () => {
    try {
        const stored = JSON.parse(localStorage.getItem(KEY) || "[]");
        kept = (Array.isArray(stored) ? stored : []).filter(isAnswer).slice(0, MOST).map(
            (one) => ({...one, picture: one.picture.startsWith(JPEG) ? one.picture : ""}));
    } catch { /* what there is must do */ }
};
const write = () => {
    for (let count = kept.length; count >= 0; count--) {
        try {
            return localStorage.setItem(KEY, JSON.stringify(kept.slice(0, count)));
        } catch { /* fewer may fit */ }
    }
};
const make = (name, properties, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
};
const draw = () => {
    element.replaceChildren();
    if (!kept.length) return;
    const forget = make("button", {type: "button", className: "clear", textContent: "Clear"});
    forget.addEventListener("click", () => { kept = []; write(); draw(); });
    const title = make("h2", {className: "title", textContent: "Your answers, kept in this browser"});
    element.append(make("div", {className: "kept"}, title, forget), make("div", {className: "thumbnails"}, ...kept.map((one) => {
        const image = make("img", {alt: "", src: one.picture || "data:,"});
        const prompts = one.answers.map(([prompt]) => prompt).join(" · ");
        const button = make("button", {type: "button"}, image, make("span", {textContent: prompts}));
        button.addEventListener("click", () => choose(one));
        return button;
    })));
};
const address = (path) => "gradio_api/file=" + path.split("/").map(encodeURIComponent).join("/");
const isThere = async (path) => (await fetch(address(path), {method: "HEAD", cache: "no-store"})).ok;
const copy = async (path) => {
    const image = new Image(), canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
    image.src = address(path);
    await image.decode();
    const scale = Math.min(1, SIDE / Math.max(image.naturalWidth, image.naturalHeight));
    canvas.width = Math.max(1, Math.round(scale * image.naturalWidth));
    canvas.height = Math.max(1, Math.round(scale * image.naturalHeight));
    pen.fillStyle = "white";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    const tries = [0.85, 0.6, 0.3, 0].map((quality) => canvas.toDataURL("image/jpeg", quality));
    return tries.find((one) => one.length <= LONGEST) || "";
};
const choose = async (one) => {
    const {picture, ...record} = one;
    try {
        if (picture && !await isThere(record.path)) {
            const name = record.path.split("/").pop().replace(/\.[^.]*$/, ".jpg");
            const blob = await (await fetch(picture)).blob();
            record.path = (await upload(new File([blob], name, {type: "image/jpeg"}))).path;
            // Of several pictures, one was copied: what is inside an answer about all of them cannot be seen any more.
            Object.assign(record, {more: [], tokens: record.more.length ? [] : record.tokens});
            kept = kept.map((other) => other === one ? {...record, picture} : other);
            write();
            draw();
        }
    } catch { /* the server will say what is missing */ }
    trigger("click", {choice: record});
};
const isSame = (one, other) => ["path", "checkpoint", "answers"].every(
    (name) => JSON.stringify(one[name]) === JSON.stringify(other[name]));
watch("value", async () => {
    draw();
    const record = props.value;
    if (!record?.path || kept.some((one) => isSame(one, record))) return;
    const picture = await copy(record.path).catch(() => "");
    read();
    kept = [{...record, picture}, ...kept].slice(0, MOST);
    write();
    draw();
});
window.addEventListener("storage", (event) => { if (event.key === KEY) { read(); draw(); } });
read();
draw();
