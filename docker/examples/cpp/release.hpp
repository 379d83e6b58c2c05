// What a release says about an engine, and its golden vectors; see manifest.json and golden/golden.json.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "json.hpp"

namespace release {

namespace fs = std::filesystem;

// A release that is not as its manifest says.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Postprocessing {
  float conf;
  double iou;
  std::size_t max_det;
  bool multi_label;
};

struct Engine {
  std::string view;
  fs::path path;
};

struct Tolerance {
  double relative_error, score, iou;
};

// Some numbers of one output: places in the flat tensor, and what the validated engine gave there.
struct GoldenOutput {
  std::string name;
  std::size_t size;
  std::vector<std::uint32_t> indices;
  std::vector<float> values;
};

struct Detection {
  float x1, y1, x2, y2, score;
  int label;
};

// One input, `[height, width, 3]` RGB, and what the engine made of it.
struct Vector {
  std::size_t height, width;
  std::vector<std::uint8_t> pixels;
  std::vector<GoldenOutput> outputs;
  std::vector<Detection> detections;
};

struct Golden {
  std::size_t compared;
  Tolerance tolerance;
  std::vector<Vector> vectors;
};

inline std::string read_file(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw Error(file.string() + ": it cannot be read");
  return {std::istreambuf_iterator<char>(stream), {}};
}

inline json::Value read_json(const fs::path& file) {
  const std::string source = read_file(file);
  try {
    return json::Parser(source).parse();
  } catch (const json::Error& error) {
    throw Error(file.string() + ": it is not valid (" + error.what() + ")");
  }
}

// The paths of a manifest stay inside the release.
inline fs::path inside(const fs::path& root, const std::string& name) {
  const fs::path path(name);
  bool leaves = path.empty() || path.is_absolute();
  for (const auto& part : path) leaves = leaves || part == "..";
  if (leaves) throw Error("the path '" + name + "' leads out of the release");
  return root / path;
}

// Raw little-endian numbers without a header, of a length that the index tells.
template <typename Number>
std::vector<Number> read_numbers(const fs::path& file, std::size_t count) {
  const std::string raw = read_file(file);
  if (raw.size() != count * sizeof(Number))
    throw Error(file.string() + ": it has " + std::to_string(raw.size()) + " bytes, but " +
                std::to_string(count * sizeof(Number)) + " are expected");
  std::vector<Number> numbers(count);
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits = 0;
    for (std::size_t byte = 0; byte < sizeof(Number); ++byte)
      bits |= static_cast<std::uint32_t>(static_cast<unsigned char>(raw[i * sizeof(Number) + byte])) << (8 * byte);
    if constexpr (sizeof(Number) == 1) {
      numbers[i] = static_cast<Number>(bits);
    } else {
      std::memcpy(&numbers[i], &bits, sizeof(Number));
    }
  }
  return numbers;
}

class Manifest {
 public:
  explicit Manifest(const fs::path& root) : root_(root), body_(read_json(root / "manifest.json")) {
    if (body_["schema_version"].as_number() != 1) throw Error("the manifest is of a schema that this program does not know");
    const auto& pre = body_["preprocessing"];
    if (pre["dtype"].as_text() != "float32" || pre["layout"].as_text() != "NCHW")
      throw Error("the engines take another input than float32 NCHW");
  }

  std::string title() const { return body_["name"].as_text() + " " + body_["version"].as_text(); }
  std::string input_name() const { return body_["preprocessing"]["input_name"].as_text(); }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& name : body_["model"]["names"].as_list()) names.push_back(name.as_text());
    return names;
  }

  Postprocessing postprocessing() const {
    const auto& post = body_["postprocessing"];
    return {static_cast<float>(post["conf"].as_number()), post["iou"].as_number(),
            post["max_det"].as_count(), post["multi_label"].as_bool()};
  }

  // The ONNX engine of that view; without a view, that of the quantized model.
  Engine engine(const std::string& view) const {
    for (const auto& entry : body_["engines"].as_list()) {
      const std::string& name = entry["view"].as_text();
      if (entry["format"].as_text() == "onnx" && (view.empty() ? name != "float" : name == view))
        return {name, inside(root_, entry["path"].as_text())};
    }
    throw Error("the release has no ONNX engine" + (view.empty() ? std::string() : " '" + view + "'"));
  }

  Golden golden(const std::string& view) const {
    const json::Value index = read_json(root_ / "golden" / "golden.json");
    if (index["schema_version"].as_number() != 1) throw Error("the golden vectors are of a schema that this program does not know");
    for (const auto& engine : index["engines"].as_list()) {
      if (engine["view"].as_text() != view) continue;
      const auto& allowed = engine["other_machine"];
      Golden golden{index["compared"].as_count(),
                    {allowed["relative_error"].as_number(), allowed["score"].as_number(), allowed["iou"].as_number()},
                    {}};
      for (const auto& result : engine["results"].as_list())
        golden.vectors.push_back(read_vector(index["inputs"].as_list(), result));
      return golden;
    }
    throw Error("the release has no golden vectors for '" + view + "'");
  }

 private:
  fs::path root_;
  json::Value body_;

  Vector read_vector(const std::vector<json::Value>& inputs, const json::Value& result) const {
    const std::size_t number = result["input"].as_count();
    if (number >= inputs.size()) throw Error("a golden result names an input that is not there");
    const json::Value& input = inputs[number];
    Vector vector{input["height"].as_count(), input["width"].as_count(), {}, {}, {}};
    vector.pixels = read_numbers<std::uint8_t>(inside(root_, input["path"].as_text()), vector.height * vector.width * 3);
    for (const auto& output : result["outputs"].as_list()) vector.outputs.push_back(read_output(output));
    const std::size_t count = result["detection_count"].as_count();
    const auto rows = read_numbers<float>(inside(root_, result["detections"].as_text()), count * 6);
    for (std::size_t i = 0; i < count; ++i) {
      const float* row = &rows[i * 6];
      vector.detections.push_back({row[0], row[1], row[2], row[3], row[4], static_cast<int>(row[5])});
    }
    return vector;
  }

  GoldenOutput read_output(const json::Value& entry) const {
    GoldenOutput output{entry["name"].as_text(), 1, {}, {}};
    for (const auto& side : entry["shape"].as_list()) output.size *= side.as_count();
    const std::size_t count = entry["count"].as_count();
    output.indices = read_numbers<std::uint32_t>(inside(root_, entry["indices"].as_text()), count);
    output.values = read_numbers<float>(inside(root_, entry["values"].as_text()), count);
    for (const auto index : output.indices)
      if (index >= output.size) throw Error("a golden index lies outside the output '" + output.name + "'");
    return output;
  }
};

}  // namespace release
