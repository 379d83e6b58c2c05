// Raw head maps to candidates, for engines that leave the decoding to their host (`raw_head` in the file's metadata).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "json.hpp"

namespace heads {

struct Map {
  std::vector<float> values;
  std::size_t channels, height, width;  // of a batch of one

  std::size_t cells() const { return height * width; }
  float at(std::size_t channel, std::size_t cell) const { return values[channel * cells() + cell]; }
};

// Columns of x, y, width, height (centre, pixels of the input) and the score of each class.
using Candidates = std::vector<std::vector<float>>;

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

class Head {
 public:
  explicit Head(const std::string& metadata) {
    const json::Value body = json::Parser(metadata).parse();
    for (const auto& stride : body["strides"].as_list()) strides_.push_back(static_cast<float>(stride.as_number()));
    if (body.has("bins")) bins_ = body["bins"].as_count();
    if (body.has("anchors"))
      for (const auto& level : body["anchors"].as_list()) {
        anchors_.emplace_back();
        for (const auto& pair : level.as_list()) {
          const auto& sides = pair.as_list();
          if (sides.size() != 2) throw json::Error("an anchor has a width and a height");
          anchors_.back().push_back({static_cast<float>(sides[0].as_number()), static_cast<float>(sides[1].as_number())});
        }
      }
    if (strides_.empty() || anchors_.empty() == (bins_ == 0) || (!anchors_.empty() && anchors_.size() != strides_.size()))
      throw json::Error("expected strides, and anchors or bins");
  }

  Candidates decode(const std::vector<Map>& maps, float conf) const {
    if (maps.size() != strides_.size() * (anchors_.empty() ? 2 : 1)) throw json::Error("the outputs do not fit it");
    Candidates found;
    for (std::size_t level = 0; level < strides_.size(); ++level)
      if (anchors_.empty())
        decode_distances(maps[2 * level], maps[2 * level + 1], strides_[level], conf, found);
      else
        decode_anchors(maps[level], anchors_[level], strides_[level], conf, found);
    return found;
  }

 private:
  std::vector<float> strides_;
  std::vector<std::vector<std::array<float, 2>>> anchors_;
  std::size_t bins_ = 0;

  // YOLOv5: for each anchor x, y, w, h, objectness and classes, all behind a sigmoid.
  static void decode_anchors(const Map& map, const std::vector<std::array<float, 2>>& anchors, float stride, float conf,
                             Candidates& found) {
    const std::size_t rows = map.channels / anchors.size();
    for (std::size_t a = 0; a < anchors.size(); ++a)
      for (std::size_t cell = 0; cell < map.cells(); ++cell) {
        const auto value = [&](std::size_t row) { return sigmoid(map.at(a * rows + row, cell)); };
        const float object = value(4), x = cell % map.width - 0.5f, y = cell / map.width - 0.5f;
        if (object <= conf) continue;
        const float w = value(2), h = value(3);
        std::vector<float> column{value(0) * (2 * stride) + x * stride, value(1) * (2 * stride) + y * stride,
                                  w * w * (4 * anchors[a][0]), h * h * (4 * anchors[a][1])};
        for (std::size_t row = 5; row < rows; ++row) column.push_back(value(row) * object);
        if (*std::max_element(column.begin() + 4, column.end()) > conf) found.push_back(std::move(column));
      }
  }

  // YOLOv8 and later: four distances from the cell's centre, each the mean of a distribution over bins.
  void decode_distances(const Map& boxes, const Map& classes, float stride, float conf, Candidates& found) const {
    for (std::size_t cell = 0; cell < classes.cells(); ++cell) {
      std::vector<float> column(4);
      for (std::size_t name = 0; name < classes.channels; ++name) column.push_back(sigmoid(classes.at(name, cell)));
      if (*std::max_element(column.begin() + 4, column.end()) <= conf) continue;
      float side[4];
      for (std::size_t i = 0; i < 4; ++i) side[i] = distance(boxes, i, cell);
      const float x = cell % classes.width + 0.5f, y = cell / classes.width + 0.5f;
      column[0] = (x + (side[2] - side[0]) * 0.5f) * stride;
      column[1] = (y + (side[3] - side[1]) * 0.5f) * stride;
      column[2] = (side[0] + side[2]) * stride;
      column[3] = (side[1] + side[3]) * stride;
      found.push_back(std::move(column));
    }
  }

  float distance(const Map& boxes, std::size_t side, std::size_t cell) const {
    if (bins_ == 1) return boxes.at(side, cell);
    float highest = boxes.at(side * bins_, cell), sum = 0, mean = 0;
    for (std::size_t bin = 1; bin < bins_; ++bin) highest = std::max(highest, boxes.at(side * bins_ + bin, cell));
    for (std::size_t bin = 0; bin < bins_; ++bin) {
      const float weight = std::exp(boxes.at(side * bins_ + bin, cell) - highest);
      sum += weight;
      mean += weight * bin;
    }
    return mean / sum;
  }
};

}  // namespace heads
