// The words of the page, in the locales that the nodes have.

const WORDS = {
  en: {
    idle: "Chunks show here as they are made",
    chunk: "chunk",
    level: "level",
    rate: "frames/s",
    left: "left",
    done: "done",
    stopped: "stopped",
    interrupted: "interrupted",
    stop: "Stop after this chunk",
    stopping: "Stopping after this chunk …",
    gone: "This server does not know the run",
    frames: "frames",
    enlarge: "click to enlarge",
    close: "Close",
  },
  zh: {
    idle: "生成的分块会依次显示在这里",
    chunk: "分块",
    level: "噪声级",
    rate: "帧/秒",
    left: "剩余",
    done: "完成",
    stopped: "已停止",
    interrupted: "已中断",
    stop: "完成当前分块后停止",
    stopping: "将在当前分块后停止 …",
    gone: "服务器上没有这次运行",
    frames: "帧",
    enlarge: "点击放大",
    close: "关闭",
  },
};

/** A word in the page's language; English where there is none. */
export function word(name) {
  const locale = document.documentElement.lang?.slice(0, 2);
  return (WORDS[locale] ?? WORDS.en)[name] ?? WORDS.en[name];
}
