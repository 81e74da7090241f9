/* ---- the little Markdown that models write, as nodes; never as HTML */
const INLINE = /`([^`]+)`|\*\*(.+?)\*\*|\*(\S(?:.*?\S)?)\*/;

const inline = (text) => {
  const nodes = [];
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    if (match.index) nodes.push(text.slice(0, match.index));
    const [, code, strong, em] = match;
    if (code !== undefined) nodes.push(make("code", "", code));
    else {
      const node = make(strong !== undefined ? "strong" : "em");
      node.append(...inline(strong !== undefined ? strong : em));
      nodes.push(node);
    }
  }
  if (text) nodes.push(text);
  return nodes;
};

const filled = (tag, text) => {
  const node = make(tag);
  node.append(...inline(text));
  return node;
};

const ITEM = /^\s*(?:([-*•])|(\d+)[.)])\s+(.*)$/;
const BREAK = /^\s*$|^```|^#{1,6}\s/;

const markdown = (text) => {
  const lines = text.split("\n"), nodes = [];
  for (let i = 0; i < lines.length;) {
    const item = ITEM.exec(lines[i]);
    if (lines[i].startsWith("```")) {
      const end = lines.findIndex((line, at) => at > i && line.startsWith("```"));
      const pre = make("pre");
      pre.append(make("code", "", lines.slice(i + 1, end < 0 ? undefined : end).join("\n")));
      nodes.push(pre);
      i = end < 0 ? lines.length : end + 1;
    } else if (/^#{1,6}\s/.test(lines[i])) {
      nodes.push(filled("h3", lines[i++].replace(/^#+\s+/, "")));
    } else if (item) {
      const list = make(item[1] ? "ul" : "ol");
      if (item[2] && item[2] !== "1") list.start = Number(item[2]);
      for (let one; i < lines.length && (one = ITEM.exec(lines[i])) && !one[1] === !item[1]; i++) list.append(filled("li", one[3]));
      nodes.push(list);
    } else if (!lines[i].trim()) {
      i++;
    } else {
      let end = i + 1;
      while (end < lines.length && !BREAK.test(lines[end]) && !ITEM.test(lines[end])) end++;
      nodes.push(filled("p", lines.slice(i, end).join("\n")));
      i = end;
    }
  }
  return nodes;
};
